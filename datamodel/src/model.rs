//! What exists: classes, fields, messages. Read once from the class files, then never changed.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::{ClassId, EnumDef, Type, Value};

/// Who may write a field through the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qualifier {
    /// Clients may set it at any time.
    ReadWrite,
    /// Clients may set it in the constructor only.
    Constructor,
    /// Only the pool sets it.
    Runtime,
}

/// Roles, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RbacRole {
    /// `read-only`
    ReadOnly,
    /// `vm-operator`
    VmOperator,
    /// `vm-admin`
    VmAdmin,
    /// `vm-power-admin`
    VmPowerAdmin,
    /// `pool-operator`
    PoolOperator,
    /// `pool-admin`
    PoolAdmin,
}

impl RbacRole {
    /// Every role, lowest first.
    pub const ALL: [Self; 6] =
        [Self::ReadOnly, Self::VmOperator, Self::VmAdmin, Self::VmPowerAdmin, Self::PoolOperator, Self::PoolAdmin];

    /// The name that the API uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::VmOperator => "vm-operator",
            Self::VmAdmin => "vm-admin",
            Self::VmPowerAdmin => "vm-power-admin",
            Self::PoolOperator => "pool-operator",
            Self::PoolAdmin => "pool-admin",
        }
    }

    /// By its name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// Where in its life a field or message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// In use.
    Live,
    /// Not promised yet.
    Prototyped,
    /// Still served; there is something better.
    Deprecated,
    /// Gone: a message answers `MESSAGE_REMOVED`.
    Removed,
}

/// How a field is tied to the field at the other end of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// This single reference is what is written; `follower` at the object it names holds this object
    /// (a set gains it, a single reference becomes it).
    Owner {
        /// Class at the other end.
        class: ClassId,
        /// Field at the other end.
        follower: u16,
    },
    /// Kept by the other end: never written directly.
    Follower {
        /// Class that owns the relation.
        class: ClassId,
        /// The owning field.
        owner: u16,
    },
    /// Both ends are sets and mirror one another; either may be written.
    Pair {
        /// Class at the other end.
        class: ClassId,
        /// Field at the other end.
        field: u16,
    },
}

/// A field of a class.
#[derive(Debug)]
pub struct FieldDef {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Who may write it.
    pub qualifier: Qualifier,
    /// What it holds when nobody said anything.
    pub default: Value,
    /// Whether a constructor's argument may leave it out.
    pub has_default: bool,
    /// Release that brought it.
    pub since: &'static str,
    /// Where in its life it is.
    pub state: Lifecycle,
    /// The relation it is an end of.
    pub relation: Option<Relation>,
    /// Lowest role that may write it.
    pub role: RbacRole,
    /// Lowest role that may read it alone.
    pub reading_role: RbacRole,
    /// Whether `get_FIELD` exists.
    pub getter: bool,
    /// Never sent to clients.
    pub hidden: bool,
    /// The first replicated format that has it: members of older ones do not know the name.
    pub format: u32,
    /// The newest format of any word that it can hold.
    pub newest_word: u32,
}

/// A class.
#[derive(Debug)]
pub struct ClassDef {
    /// Its index.
    pub id: ClassId,
    /// Its name, such as `VM_metrics`.
    pub name: &'static str,
    /// Its lower-case name, as events spell it.
    pub event_name: &'static str,
    /// Fields in model order.
    pub fields: Vec<FieldDef>,
    /// Whether its objects are rows.
    pub stored: bool,
    /// Not XenAPI: rows that only the pool sees.
    pub internal: bool,
    /// Whether changes to its rows reach `event.from`.
    pub emits_events: bool,
    /// The first replicated format that has it.
    pub format: u32,
    by_name: HashMap<&'static str, u16>,
}

impl ClassDef {
    pub(crate) fn new(
        id: ClassId,
        name: &'static str,
        event_name: &'static str,
        stored: bool,
        internal: bool,
        format: u32,
        fields: Vec<FieldDef>,
    ) -> Self {
        let by_name = fields.iter().zip(0..).map(|(field, index)| (field.name, index)).collect();
        // Sessions, users and secrets are nobody else's business.
        let emits_events = stored && !internal && !matches!(name, "session" | "user" | "secret");
        Self { id, name, event_name, fields, stored, internal, emits_events, format, by_name }
    }

    /// The index of a field by its wire name.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<u16> {
        self.by_name.get(name).copied()
    }

    /// The definition of a field by its index.
    #[must_use]
    pub fn field_def(&self, index: u16) -> Option<&FieldDef> {
        self.fields.get(usize::from(index))
    }
}

/// A parameter of a message, without the session.
#[derive(Debug)]
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// What it is when the caller leaves it out; only a tail of the list has one.
    pub default: Option<Value>,
}

/// What a derived message does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implicit {
    /// `get_all`
    GetAll,
    /// `get_all_records`
    GetAllRecords,
    /// `get_all_where`: undocumented
    GetAllWhere,
    /// `get_all_records_where`
    GetAllRecordsWhere,
    /// `get_by_uuid`
    GetByUuid,
    /// `get_by_name_label`
    GetByNameLabel,
    /// `get_record`
    GetRecord,
    /// `get_FIELD`
    Get(u16),
    /// `set_FIELD`
    Set(u16),
    /// `add_FIELD`
    AddToSet(u16),
    /// `remove_FIELD`
    RemoveFromSet(u16),
    /// `add_to_FIELD`
    AddToMap(u16),
    /// `remove_from_FIELD`
    RemoveFromMap(u16),
    /// `create`
    Create,
    /// `destroy`
    Destroy,
}

/// A message: something a client can call.
#[derive(Debug)]
pub struct MessageDef {
    /// Its class.
    pub class: ClassId,
    /// Its name without the class.
    pub name: &'static str,
    /// `CLASS.NAME`.
    pub full_name: &'static str,
    /// Parameters after the session.
    pub params: Vec<Param>,
    /// Whether the first argument is a session.
    pub takes_session: bool,
    /// What it answers.
    pub result: Type,
    /// Errors that it documents.
    pub errors: Vec<&'static str>,
    /// Lowest role that may call it; `None` where the model names none: any session.
    pub min_role: Option<RbacRole>,
    /// What it does, where it is derived from the fields.
    pub implicit: Option<Implicit>,
    /// Whether `Async.` exists.
    pub asynchronous: bool,
    /// Release that brought it.
    pub since: &'static str,
    /// Where in its life it is.
    pub state: Lifecycle,
    /// Served but not listed.
    pub hidden: bool,
}

/// The whole data model.
#[derive(Debug)]
pub struct Model {
    classes: Vec<ClassDef>,
    messages: Vec<MessageDef>,
    enums: Vec<(ClassId, &'static EnumDef)>,
    class_by_name: HashMap<&'static str, ClassId>,
    class_by_event_name: HashMap<&'static str, ClassId>,
    message_by_name: HashMap<&'static str, usize>,
}

impl Model {
    pub(crate) fn new(
        classes: Vec<ClassDef>,
        messages: Vec<MessageDef>,
        enums: Vec<(ClassId, &'static EnumDef)>,
    ) -> Self {
        let class_by_name = classes.iter().map(|class| (class.name, class.id)).collect();
        let class_by_event_name = classes.iter().map(|class| (class.event_name, class.id)).collect();
        let mut message_by_name = HashMap::with_capacity(messages.len() * 2);
        for (index, message) in messages.iter().enumerate() {
            message_by_name.insert(message.full_name, index);
            // Some clients write `event_from` for `event.from`.
            let underscored: &'static str = Box::leak(message.full_name.replacen('.', "_", 1).into_boxed_str());
            message_by_name.entry(underscored).or_insert(index);
        }
        Self { classes, messages, enums, class_by_name, class_by_event_name, message_by_name }
    }

    /// Every class in model order, internal ones last.
    #[must_use]
    pub fn classes(&self) -> &[ClassDef] {
        &self.classes
    }

    /// A class by its id. Ids come from the model, so that an unknown one is a defect: the first class answers.
    #[must_use]
    pub fn class(&self, id: ClassId) -> &ClassDef {
        self.classes.get(usize::from(id.0)).unwrap_or(&self.classes[0])
    }

    /// By exact name.
    #[must_use]
    pub fn class_named(&self, name: &str) -> Option<ClassId> {
        self.class_by_name.get(name).copied()
    }

    /// By the name events use.
    #[must_use]
    pub fn class_with_event_name(&self, name: &str) -> Option<ClassId> {
        self.class_by_event_name.get(name).copied()
    }

    /// A message by `Class.message` or `Class_message`, without any `Async.`.
    #[must_use]
    pub fn message(&self, name: &str) -> Option<&MessageDef> {
        self.message_by_name.get(name).and_then(|index| self.messages.get(*index))
    }

    /// Every message.
    #[must_use]
    pub fn messages(&self) -> &[MessageDef] {
        &self.messages
    }

    /// Every enum with the class that declares it.
    #[must_use]
    pub fn enums(&self) -> &[(ClassId, &'static EnumDef)] {
        &self.enums
    }

    /// What `system.listMethods` answers: every message, its `Async.` form behind it where there is one.
    #[must_use]
    pub fn list_methods(&self) -> Vec<String> {
        let mut names = Vec::with_capacity(self.messages.len() * 2);
        for message in self.messages.iter().filter(|message| !message.hidden) {
            names.push(message.full_name.to_owned());
            if message.asynchronous {
                names.push(format!("Async.{}", message.full_name));
            }
        }
        names.push("system.listMethods".to_owned());
        names
    }
}

static MODEL: LazyLock<Model> = LazyLock::new(crate::load::load);

/// The data model; read from the embedded class files at first use.
#[must_use]
pub fn model() -> &'static Model {
    &MODEL
}
