//! What a start did without that no counter of messages tells of: changes of a stream's state, what the
//! disk did not give, and the whole folder of the dead letters or of the broker.

use std::path::Path;

use super::BROKER;
use crate::batch::Offset;
use crate::config::DEAD_LETTERS;
use crate::stream::log::{Damage, ReadOnly, Recovery, segment};
use crate::telemetry::Standing;

/// Returns what a person has to know of the start of a stream in `dir`.
pub fn of(dir: &Path, name: &str, recovery: &Recovery) -> Vec<Standing> {
    let lost = match name {
        DEAD_LETTERS if recovery.created => lost_letters(dir),
        BROKER if recovery.created => lost_broker(dir),
        _ => None,
    };
    damaged(dir, name, recovery).into_iter().chain(lost).collect()
}

/// Returns what a person has to know where a start made the folder of the dead letters, and a host ran in
/// this data folder before. The broker's stream tells: it is made after the dead letters, and opened after
/// them. No letter that is gone is counted anywhere else.
fn lost_letters(dir: &Path) -> Option<Standing> {
    let of_broker = dir.parent()?.join(BROKER);
    let ran_before = !matches!(ReadOnly::open(&of_broker, Offset(0)).partitions(), Ok(None));
    ran_before.then(|| Standing {
        part: format!("stream {DEAD_LETTERS}"),
        kind: "other_log",
        cause: format!(
            "a host ran in this data folder before, and {} was not there or was empty at this start, which made it \
             anew: messages that were rejected and not sent again are gone, and so is which of them were sent",
            dir.display()
        ),
        advice: "where the folder was moved, or its disk is not mounted, stop the host and put it back; where it was \
                 removed to begin anew, nothing is to be done: the next start does not say it again"
            .to_owned(),
    })
}

/// Returns what a person has to know where a start made the folder of the broker, and a host ran in this
/// data folder before. The dead letters tell, which each start opens before the broker's stream: they were
/// opened by an earlier start too.
fn lost_broker(dir: &Path) -> Option<Standing> {
    let of_letters = dir.parent()?.join(DEAD_LETTERS);
    let ran_before = ReadOnly::open(&of_letters, Offset(0)).openings().is_ok_and(|openings| openings > 1);
    ran_before.then(|| Standing {
        part: format!("stream {BROKER}"),
        kind: "other_log",
        cause: format!(
            "a host ran in this data folder before, and {} was not there or was empty at this start, which made it \
             anew: persistent sessions with their subscriptions and the messages that waited for them, retained \
             messages and delayed wills are gone",
            dir.display()
        ),
        advice: "where the folder was moved, or its disk is not mounted, stop the host and put it back; otherwise \
                 connect clients with persistent sessions again, so that they subscribe, and publish retained messages \
                 again; the next start does not say it again"
            .to_owned(),
    })
}

/// Returns what a person has to know where a start found damage that holds no message: changes of the
/// stream's state were in it, and no counter of messages tells of them.
fn damaged(dir: &Path, name: &str, recovery: &Recovery) -> Option<Standing> {
    let is_of_state = |damage: &&Damage| damage.offsets.start >= damage.offsets.end;
    let damaged = recovery.damaged.iter().filter(is_of_state);
    let mut places: Vec<_> =
        damaged.map(|damage| (dir.join(segment::name(damage.segment)), damage.bytes.clone())).collect();
    // What the disk did not give may have been messages that no other frame tells of.
    let unread = recovery.unread.iter().filter(|unread| !unread.is_header());
    places.extend(unread.map(|unread| (unread.path.clone(), unread.bytes.clone())));
    let (file, bytes) = places.first()?;
    let what = match name {
        DEAD_LETTERS => "which dead letters were sent or closed",
        BROKER => "sessions, subscriptions, retained messages or wills",
        _ => "the places of sinks in it, and open QoS 2 packet ids",
    };
    Some(Standing {
        part: format!("stream {name} (state)"),
        kind: "gap",
        cause: format!(
            "the host started without what is damaged or cannot be read in {} places of its files, the first at bytes \
             {} to {} of {}: changes of its state ({what}), or the last messages that were acknowledged",
            places.len(),
            bytes.start,
            bytes.end,
            file.display()
        ),
        advice: "look at the disk and the kernel's log, and compare what clients and databases have; the next start \
                 does not say it again"
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::stream::Config;
    use crate::stream::log::{Log, RealDisk, Unread};
    use crate::units::ByteSize;

    #[test]
    fn state_that_a_start_found_damaged_or_could_not_read_is_told_with_its_place_and_lost_messages_are_not_told_twice()
     {
        let damage = |offsets| Damage { segment: 3, bytes: 4_096..8_192, offsets };
        let with = |offsets| Recovery { damaged: vec![damage(offsets)], ..Recovery::default() };
        let told = |name, recovery: &Recovery| of(Path::new("/data/broker"), name, recovery);
        assert_eq!(told(BROKER, &Recovery::default()), []);
        assert_eq!(told(BROKER, &with(Offset(3)..Offset(9))), [], "its messages are counted");
        let fault = told(BROKER, &with(Offset(3)..Offset(3))).remove(0);
        assert_eq!((&*fault.part, fault.kind), ("stream broker (state)", "gap"));
        let place = "bytes 4096 to 8192 of /data/broker/00000000000000000003.seg";
        let unread =
            Unread { path: Path::new("/data/broker/00000000000000000003.seg").into(), bytes: 4_096..8_192 };
        let unread = Recovery { unread: vec![unread], ..Recovery::default() };
        assert_eq!(told(BROKER, &unread), told(BROKER, &with(Offset(3)..Offset(3))));
        assert!(fault.cause.contains(place) && fault.cause.contains("sessions"), "{}", fault.cause);
        let header =
            Unread { path: Path::new("/data/broker/00000000000000000003.seg").into(), bytes: 0..4_096 };
        let header = Recovery { unread: vec![header], ..Recovery::default() };
        assert_eq!(told(BROKER, &header), [], "it was made again from what follows");
    }

    #[test]
    fn a_start_without_the_folder_of_the_dead_letters_or_the_broker_is_told_once_and_a_first_start_is_not() {
        let data = tempfile::tempdir().expect("makes");
        let (segment_bytes, reserve_bytes) = (ByteSize::kib(64), ByteSize(0));
        let config = Config { segment_bytes, reserve_bytes, ..Config::default() };
        let open = |name: &str| {
            let (disk, dir) = (Arc::new(RealDisk::default()), data.path().join(name));
            let (log, recovery) = Log::open(disk, &dir, name, &config).expect("opens");
            drop(log);
            of(&dir, name, &recovery)
        };
        // A host opens them in this order.
        let start = || [open("telemetry"), open(DEAD_LETTERS), open(BROKER)].concat();
        assert_eq!(start(), []);
        assert_eq!(start(), []);
        let cases = [(DEAD_LETTERS, false), (DEAD_LETTERS, true), (BROKER, false), (BROKER, true)];
        for (name, is_made_again) in cases {
            let folder = data.path().join(name);
            std::fs::remove_dir_all(&folder).expect("removes");
            if is_made_again {
                std::fs::create_dir(&folder).expect("makes");
            }
            let told = start();
            let [fault] = &told[..] else { panic!("{told:?}") };
            assert_eq!((fault.part.clone(), fault.kind), (format!("stream {name}"), "other_log"));
            assert!(fault.cause.contains(&folder.display().to_string()), "{}", fault.cause);
            assert_eq!(start(), [], "the next does not say it");
        }
    }
}
