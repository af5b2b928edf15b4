use super::*;

#[test]
fn a_version_begins_behind_what_any_lane_has_handed_out() {
    let schedule = Schedule::default();
    assert!(schedule.claim(0, Offset(10)).is_empty());
    assert!(schedule.claim(1, Offset(30)).is_empty());
    let flip = |at_least: u64| {
        let lanes = [0, 1].map(|lane| (lane, vec![Steps::default()])).into_iter();
        let mut begin = None;
        let record = |begins: &Begins| {
            begin = Some(begins[0].0);
            Ok(Ticket(1))
        };
        schedule.flip(lanes, &[Offset(0), Offset(at_least)], record).unwrap();
        begin
    };
    assert_eq!(flip(0), Some(30));
    // The one before has run nothing, in any lane.
    assert_eq!(flip(30), Some(30));
    let begins = |flips: Vec<Flip>| flips.iter().map(|flip| flip.begins[0].0).collect::<Vec<_>>();
    assert_eq!(begins(schedule.claim(1, Offset(40))), [30]);
    assert_eq!(flip(50), Some(50));
    let lanes = [(0, Vec::new())].into_iter();
    assert!(schedule.flip(lanes, &[Offset(60)], |_| Err(AppendError::Full)).is_err());
    assert_eq!(begins(schedule.claim(0, Offset(20))), [30, 50]);
    schedule.forget(1);
    assert!(schedule.claim(1, Offset(60)).is_empty() && schedule.claim(0, Offset(60)).is_empty());
}

#[test]
fn a_worker_runs_a_message_with_the_last_version_that_begins_before_it() {
    let mut versions = OfWorker(Vec::new());
    for at in [[0, 0], [10, 20], [15, 18]] {
        versions.push(at.into_iter().map(Offset).collect(), Steps::default());
    }
    let of = |versions: &OfWorker, partition, offset| versions.of(Partition(partition), Offset(offset));
    assert_eq!(of(&versions, 0, 9), (0, Some(Offset(10))));
    assert_eq!(of(&versions, 0, 10), (1, Some(Offset(15))));
    assert_eq!(of(&versions, 1, 17), (0, Some(Offset(18))));
    assert_eq!(of(&versions, 1, 18), (2, None));
    versions.drop_below(Offset(17));
    assert_eq!(versions.0.len(), 3);
    versions.drop_below(Offset(18));
    assert_eq!((versions.0.len(), of(&versions, 0, 18)), (1, (0, None)));
}
