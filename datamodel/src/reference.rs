//! References: how one object names another, and how the wire spells it.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::str::FromStr;

use uuid::Uuid;

use crate::model::{ClassDef, model};

const PREFIX: &str = "OpaqueRef:";

/// A reference whose class is not known to the compiler. Sixteen bytes, as two words, for rows are full of them and a
/// number of 128 bits would have them padded; the nil UUID is `OpaqueRef:NULL`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct OpaqueRef(u64, u64);

impl OpaqueRef {
    /// The null reference.
    pub const NULL: Self = Self(0, 0);

    /// The reference with these bits.
    #[must_use]
    pub const fn from_uuid(uuid: Uuid) -> Self {
        let (high, low) = uuid.as_u64_pair();
        Self(high, low)
    }

    /// The bits, as a UUID. Not the object's `uuid` field.
    #[must_use]
    pub const fn bits(self) -> Uuid {
        Uuid::from_u64_pair(self.0, self.1)
    }

    /// Whether this is `OpaqueRef:NULL`.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == 0 && self.1 == 0
    }

    /// Appends the wire form without allocating.
    pub fn write_to(self, out: &mut Vec<u8>) {
        out.extend_from_slice(PREFIX.as_bytes());
        if self.is_null() {
            out.extend_from_slice(b"NULL");
        } else {
            let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
            out.extend_from_slice(self.bits().hyphenated().encode_lower(&mut text).as_bytes());
        }
    }
}

impl fmt::Display for OpaqueRef {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_null() {
            write!(formatter, "{PREFIX}NULL")
        } else {
            write!(formatter, "{PREFIX}{}", self.bits().hyphenated())
        }
    }
}

impl fmt::Debug for OpaqueRef {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The text is no reference of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a reference")]
pub struct NotAReference;

impl FromStr for OpaqueRef {
    type Err = NotAReference;

    fn from_str(text: &str) -> Result<Self, NotAReference> {
        match text.strip_prefix(PREFIX) {
            Some("NULL") => Ok(Self::NULL),
            // Only the exact spelling that we hand out: another one is another client's invention.
            Some(bits)
                if bits.len() == uuid::fmt::Hyphenated::LENGTH
                    && !bits.bytes().any(|byte| byte.is_ascii_uppercase()) =>
            {
                Uuid::try_parse(bits).map(Self::from_uuid).map_err(|_| NotAReference)
            }
            _ => Err(NotAReference),
        }
    }
}

/// The index of a class in model order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub u16);

impl ClassId {
    /// The class's definition.
    #[must_use]
    pub fn def(self) -> &'static ClassDef {
        model().class(self)
    }

    /// By its exact name in the data model, such as `VM`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        model().class_named(name)
    }

    /// By the lower-case name that events use, such as `vm`.
    #[must_use]
    pub fn from_event_name(name: &str) -> Option<Self> {
        model().class_with_event_name(name)
    }
}

/// A marker type for each class, so that references carry their class.
pub trait ClassKind: 'static {
    /// The class.
    const ID: ClassId;
    /// Its name in the data model.
    const NAME: &'static str;
}

/// A reference to an object of class `C`; never checked for existence.
pub struct Ref<C> {
    opaque: OpaqueRef,
    class: PhantomData<fn() -> C>,
}

impl<C> Ref<C> {
    /// The null reference.
    pub const NULL: Self = Self::from_opaque(OpaqueRef::NULL);

    /// A reference with these bits.
    #[must_use]
    pub const fn new(uuid: Uuid) -> Self {
        Self::from_opaque(OpaqueRef::from_uuid(uuid))
    }

    /// Takes the caller's word for the class.
    #[must_use]
    pub const fn from_opaque(opaque: OpaqueRef) -> Self {
        Self { opaque, class: PhantomData }
    }

    /// The reference without its class.
    #[must_use]
    pub const fn opaque(self) -> OpaqueRef {
        self.opaque
    }

    /// Whether this is `OpaqueRef:NULL`.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.opaque.is_null()
    }
}

impl<C> Clone for Ref<C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for Ref<C> {}
impl<C> PartialEq for Ref<C> {
    fn eq(&self, other: &Self) -> bool {
        self.opaque == other.opaque
    }
}
impl<C> Eq for Ref<C> {}
impl<C> Hash for Ref<C> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.opaque.hash(state);
    }
}
impl<C> PartialOrd for Ref<C> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<C> Ord for Ref<C> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.opaque.cmp(&other.opaque)
    }
}
impl<C> Default for Ref<C> {
    fn default() -> Self {
        Self::NULL
    }
}
impl<C> fmt::Display for Ref<C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.opaque, formatter)
    }
}
impl<C> fmt::Debug for Ref<C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.opaque, formatter)
    }
}
impl<C> From<Ref<C>> for String {
    fn from(reference: Ref<C>) -> Self {
        reference.to_string()
    }
}
impl From<OpaqueRef> for String {
    fn from(reference: OpaqueRef) -> Self {
        reference.to_string()
    }
}
