//! Messages of the class console: consoles come and go with domains, and are not made by anybody.

use datamodel::{Console, Ref, Value, errors};

use crate::call::Call;
use crate::failure::{Served, refuse};

pub(super) async fn create(_: &Call, _: Value) -> Served<Ref<Console>> {
    refuse(errors::operation_not_allowed("consoles come with domains"))
}

pub(super) async fn destroy(cx: &Call, this: Ref<Console>) -> Served<()> {
    cx.row(this)?;
    refuse(errors::operation_not_allowed("consoles go with domains"))
}
