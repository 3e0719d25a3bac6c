//! Messages of the class task.

use datamodel::enums::TaskStatusType;
use datamodel::fields::task;
use datamodel::{ClassKind, Ref, Task};

use crate::call::Call;
use crate::failure::Served;
use crate::tasks;

pub(super) async fn create(cx: &Call, label: String, description: String) -> Served<Ref<Task>> {
    let mut change = cx.transaction();
    let reference = tasks::insert(cx, &mut change, label, description);
    cx.commit(change).await?;
    Ok(reference)
}

pub(super) async fn destroy(cx: &Call, this: Ref<Task>) -> Served<()> {
    let mut change = cx.transaction();
    change.expect_exists(Task::ID, this.opaque()).delete(this);
    cx.commit(change).await.map(drop)
}

pub(super) async fn cancel(cx: &Call, this: Ref<Task>) -> Served<()> {
    tasks::cancel(cx, this).await
}

pub(super) async fn set_status(cx: &Call, this: Ref<Task>, value: TaskStatusType) -> Served<()> {
    let mut change = cx.transaction();
    change.set(this, task::STATUS, value);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_progress(cx: &Call, this: Ref<Task>, value: f64) -> Served<()> {
    let mut change = cx.transaction();
    change.set(this, task::PROGRESS, value);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_result(cx: &Call, this: Ref<Task>, value: String) -> Served<()> {
    let mut change = cx.transaction();
    change.set(this, task::RESULT, value);
    cx.commit(change).await.map(drop)
}

pub(super) async fn set_error_info(cx: &Call, this: Ref<Task>, value: Vec<String>) -> Served<()> {
    let mut change = cx.transaction();
    change.set(this, task::ERROR_INFO, value);
    cx.commit(change).await.map(drop)
}
