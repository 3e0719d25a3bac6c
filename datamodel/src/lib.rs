//! XenAPI as data: what exists, who may call it, what it can answer. No IO, no clock.
//!
//! One file per class under `datamodel/classes/` states fields, enums, relations and explicit messages;
//! `datamodel/errors.toml` states the error codes. Everything generic follows from them: typed field ids
//! and error constructors at build time (`build.rs`), and at run time the [`Model`]: implicit messages,
//! arity and type checks, encodings, the filter language.
//!
//! To add a field: one line under `[fields]`. To add a message: one line under `[messages]`, and its
//! function in `controller/src/api/<class>.rs`. A test compares the whole with the published model.

mod arguments;
mod derive;
pub mod encode;
mod error;
mod field;
pub mod filter;
mod input;
mod load;
mod model;
mod notation;
mod reference;
mod timestamp;
mod types;
mod value;

pub use arguments::{Arguments, arguments};
pub use error::ApiError;
pub use field::{Field, FieldValue};
pub use filter::Filter;
pub use input::{Input, Misfit, convert};
pub use model::{
    ClassDef, FieldDef, Implicit, Lifecycle, MessageDef, Model, Param, Qualifier, RbacRole, Relation, model,
};
pub use reference::{ClassId, ClassKind, NotAReference, OpaqueRef, Ref};
pub use timestamp::{NotADate, Timestamp};
pub use types::{EnumDef, Type};
pub use value::{Key, Map, Set, Value};

/// A word that is not in the enum named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a word of the enum {0}")]
pub struct UnknownWord(pub &'static str);

include!(concat!(env!("OUT_DIR"), "/classes.rs"));

/// The model's enums as Rust types.
pub mod enums {
    use crate::field::api_enum;
    include!(concat!(env!("OUT_DIR"), "/enums.rs"));
}

/// Typed ids of every field, a module for each class.
pub mod fields {
    #![allow(unused_imports)]
    use std::collections::BTreeMap;

    use crate::enums::*;
    use crate::*;
    include!(concat!(env!("OUT_DIR"), "/fields.rs"));
}

/// Every error code of the API, with a constructor that takes its parameters by name.
pub mod errors {
    use crate::ApiError;
    include!(concat!(env!("OUT_DIR"), "/errors.rs"));
}
