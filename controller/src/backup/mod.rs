//! The pool's database as a file, and back.
//!
//! ```text
//! <database>
//!   <manifest>
//!     <pair key="format" value="1"/> … <pair key="rows" value="N"/>
//!   </manifest>
//!   <table name="VM">
//!     <row ref="OpaqueRef:…">{"name_label":"…", …}</row>
//!   </table>
//! </database>
//! ```
//!
//! The frame is the one that the incumbent's dumps have; a row is JSON, in which every value has one form and nothing is
//! lost. Fields that hold the model's default are left out. `docs/http-api.md` describes it for others.
//!
//! What is in it is what the pool was told. What it finds out by itself or what makes these hosts a pool (members, its
//! certificate authority, accounts, the hosts' processors and metrics, sessions, tasks) is not: a restore leaves that
//! as it is, and so the hosts that are the pool go on being it. See [`plan`] for how the two are put together.

mod dump;
mod plan;
mod read;
mod restore;
mod text;

use datamodel::{ClassDef, ClassId, OpaqueRef, Value};

pub(crate) use dump::write;
pub(crate) use read::read;
pub(crate) use restore::{forget_stages, restore};

/// The version of the form above that is written, and the newest that is read.
const FORMAT: u32 = 1;

/// What becomes of a class's rows when a dump is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// Not in a dump; the pool's own stay as they are.
    Own,
    /// The pool's own rows stay, and take over the settings of the dump's rows that stand for the same thing.
    Merged,
    /// The dump's rows come in the place of the pool's.
    Replaced,
}

fn treatment(class: &ClassDef) -> Treatment {
    match class.name {
        _ if !class.stored || class.internal => Treatment::Own,
        "session" | "task" | "role" | "user" => Treatment::Own,
        "host_cpu" | "host_metrics" | "host_crashdump" | "host_patch" | "PIF_metrics" | "PCI" | "PGPU" | "PUSB" => {
            Treatment::Own
        }
        "Certificate" | "SM" | "Feature" | "console" | "VM_guest_metrics" => Treatment::Own,
        "pool" | "host" | "PIF" => Treatment::Merged,
        _ => Treatment::Replaced,
    }
}

/// A row of a dump.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DumpRow {
    class: ClassId,
    reference: OpaqueRef,
    /// Those that do not hold the model's default.
    fields: Vec<(u16, Value)>,
}
