//! What a start did without that no counter of messages tells of: changes of a stream's state, and what the
//! disk did not give.

use std::path::Path;

use super::BROKER;
use crate::config::DEAD_LETTERS;
use crate::stream::log::{Damage, Recovery, segment};
use crate::telemetry::Standing;

/// Returns what a person has to know where a start found damage that holds no message: changes of the
/// stream's state were in it, and no counter of messages tells of them.
pub fn of(dir: &Path, name: &str, recovery: &Recovery) -> Option<Standing> {
    let is_of_state = |damage: &&Damage| damage.offsets.start >= damage.offsets.end;
    let damaged = recovery.damaged.iter().filter(is_of_state);
    let mut places: Vec<_> =
        damaged.map(|damage| (dir.join(segment::name(damage.segment)), damage.bytes.clone())).collect();
    // What the disk did not give may have been messages that no other frame tells of.
    places.extend(recovery.unread.iter().map(|unread| (unread.path.clone(), unread.bytes.clone())));
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
    use super::*;
    use crate::batch::Offset;
    use crate::stream::log::Unread;

    #[test]
    fn state_that_a_start_found_damaged_or_could_not_read_is_told_with_its_place_and_lost_messages_are_not_told_twice()
     {
        let damage = |offsets| Damage { segment: 3, bytes: 4_096..8_192, offsets };
        let with = |offsets| Recovery { damaged: vec![damage(offsets)], ..Recovery::default() };
        let told = |name, recovery: &Recovery| of(Path::new("/data/broker"), name, recovery);
        assert_eq!(told(BROKER, &Recovery::default()), None);
        assert_eq!(told(BROKER, &with(Offset(3)..Offset(9))), None, "its messages are counted");
        let fault = told(BROKER, &with(Offset(3)..Offset(3))).unwrap();
        assert_eq!((&*fault.part, fault.kind), ("stream broker (state)", "gap"));
        let place = "bytes 4096 to 8192 of /data/broker/00000000000000000003.seg";
        let unread =
            Unread { path: Path::new("/data/broker/00000000000000000003.seg").into(), bytes: 4_096..8_192 };
        let unread = Recovery { unread: vec![unread], ..Recovery::default() };
        assert_eq!(told(BROKER, &unread), told(BROKER, &with(Offset(3)..Offset(3))));
        assert!(fault.cause.contains(place) && fault.cause.contains("sessions"), "{}", fault.cause);
    }
}
