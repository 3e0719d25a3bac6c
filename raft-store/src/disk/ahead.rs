//! Records are decoded ahead of who takes them, by several threads, and taken in their order.
//!
//! Decoding is most of what a start with a large pool costs, and each record is decoded by itself.

use std::sync::mpsc::sync_channel;

use bytes::Bytes;

use crate::offload;

/// Records that go to a thread at once.
const CHUNK: usize = 512;
/// Chunks that a thread may be ahead.
const AHEAD: usize = 4;
/// With more threads it would be who takes the records that all wait for.
const MOST_THREADS: usize = 4;

/// Decodes each item and hands it over; ends with the first error, in the order of items.
pub(super) fn in_order<T: Send, E: Send>(
    mut items: impl Iterator<Item = Result<Bytes, E>> + Send,
    decode: impl Fn(Bytes) -> Result<T, E> + Sync,
    mut take: impl FnMut(T) -> Result<(), E>,
) -> Result<(), E> {
    if offload::is_alone() {
        return items.try_for_each(|item| take(decode(item?)?));
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    std::thread::scope(|scope| {
        let (mut doors, mut results) = (Vec::new(), Vec::new());
        for _ in 0..threads {
            let (door, chunks) = sync_channel::<Vec<Result<Bytes, E>>>(AHEAD);
            let (tell, told) = sync_channel::<Result<Vec<T>, E>>(AHEAD);
            let decode = &decode;
            scope.spawn(move || {
                for chunk in chunks {
                    let decoded = chunk.into_iter().map(|item| decode(item?)).collect();
                    // Nobody takes any more: an error came before.
                    if tell.send(decoded).is_err() {
                        return;
                    }
                }
            });
            doors.push(door);
            results.push(told);
        }
        scope.spawn(move || {
            for door in doors.iter().cycle() {
                let chunk: Vec<_> = items.by_ref().take(CHUNK).collect();
                if chunk.is_empty() || door.send(chunk).is_err() {
                    return;
                }
            }
        });
        for result in results.iter().cycle() {
            // The first that has nothing more is the one whose turn it would have been.
            let Ok(decoded) = result.recv() else { break };
            decoded?.into_iter().try_for_each(&mut take)?;
        }
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;

    use super::{CHUNK, in_order};

    const ITEMS: usize = 40 * CHUNK + 7;

    fn items() -> impl Iterator<Item = Result<Bytes, usize>> + Send {
        (0..ITEMS).map(|number| Ok(Bytes::copy_from_slice(&number.to_be_bytes())))
    }

    fn number(bytes: &Bytes) -> usize {
        usize::from_be_bytes(bytes.as_ref().try_into().unwrap())
    }

    #[test]
    fn every_record_is_taken_once_in_its_order() {
        let mut taken = Vec::new();
        in_order(
            items(),
            |bytes| Ok(number(&bytes)),
            |number| {
                taken.push(number);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(taken, (0..ITEMS).collect::<Vec<_>>());
        in_order(std::iter::empty::<Result<Bytes, usize>>(), |_| Ok(()), |()| Err(1)).unwrap();
    }

    #[test]
    fn the_first_error_ends_it_wherever_it_comes_from() {
        let read = items().map(|item| item.and_then(|bytes| if number(&bytes) < 9_000 { Ok(bytes) } else { Err(1) }));
        assert_eq!(in_order(read, |_| Ok(()), |()| Ok(())), Err(1));
        let decoded = |bytes: Bytes| if number(&bytes) < 9_000 { Ok(()) } else { Err(2) };
        assert_eq!(in_order(items(), decoded, |()| Ok(())), Err(2));
        let mut left = 9_000;
        let taken = |()| {
            left -= 1;
            if left == 0 { Err(3) } else { Ok(()) }
        };
        assert_eq!(in_order(items(), |_| Ok(()), taken), Err(3));
    }
}
