//! Histories of write, restore, clone and delivery, against a model that knows each message.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// One copy of the data folder. The process that has it open wrote the last opening.
#[derive(Clone, Debug, Default)]
struct Folder {
    /// A number for each message ever written, by offset; copies share those that they have in
    /// common.
    messages: Vec<u64>,
    openings: Vec<Opening>,
    /// First kept message.
    start: u64,
}

/// A sink: the row of its position, and how often it got each message.
#[derive(Debug, Default)]
struct Database {
    next: u64,
    /// As text, as a database has it.
    openings: Option<String>,
    rows: HashMap<u64, u32>,
}

#[derive(Default)]
struct World {
    drawn: u64,
    database: Database,
}

#[derive(Clone, Debug)]
enum Op {
    /// A host that runs writes messages.
    Write { host: usize, count: usize },
    /// A host takes the sink over and delivers so many.
    Deliver { host: usize, count: u64 },
    /// A host ends and starts, perhaps without its last messages.
    Restart { host: usize, lost: usize },
    /// A folder is copied, while its host is down for a moment, and another host runs on the copy.
    Clone { host: usize },
    /// A host is stopped and started on the folder of another one.
    Restore { host: usize, from: usize },
    /// Retention removes what the host delivered, as far as it knows.
    Trim { host: usize },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let host = || 0..4_usize;
    let op = prop_oneof![
        6 => (host(), 1..9_usize).prop_map(|(host, count)| Op::Write { host, count }),
        6 => (host(), 0..12_u64).prop_map(|(host, count)| Op::Deliver { host, count }),
        3 => (host(), prop_oneof![3 => Just(0), 1 => 1..6_usize]).prop_map(|(host, lost)| Op::Restart { host, lost }),
        2 => host().prop_map(|host| Op::Clone { host }),
        2 => (host(), host()).prop_map(|(host, from)| Op::Restore { host, from }),
        1 => host().prop_map(|host| Op::Trim { host }),
    ];
    prop::collection::vec(op, 1..60)
}

impl Folder {
    fn end(&self) -> u64 {
        self.messages.len() as u64
    }

    /// As the log does: openings without a message in it go, a new one comes.
    fn open(&mut self, id: u64) {
        let end = self.end();
        let nexts: Vec<u64> =
            self.openings.iter().skip(1).map(|next| next.first.0.min(end)).chain([end]).collect();
        let mut nexts = nexts.into_iter();
        let start = self.start;
        self.openings.retain(|opening| opening.first.0.max(start) < nexts.next().unwrap());
        self.openings.push(Opening { id, first: Offset(end) });
    }
}

impl World {
    fn draw(&mut self) -> u64 {
        self.drawn += 1;
        self.drawn
    }

    /// What a host's sink does when it opens, then commits of a few messages each.
    fn deliver(&mut self, folder: &Folder, count: u64) {
        let row = &mut self.database;
        let (openings, start) = (&folder.openings, Offset(folder.start));
        let read = |text: &Option<String>| Lineage::read(text.as_deref()).unwrap();
        let step = |row: &mut Database, to: u64| {
            if let Some(moved) = read(&row.openings).moved(openings, Offset(row.next), Offset(to)) {
                row.openings = Some(moved.to_string());
                assert_eq!(read(&row.openings), moved);
            }
            row.next = to;
        };
        let located = read(&row.openings).locate(Offset(row.next), openings, start);
        if located.0 != row.next {
            step(row, located.0);
        }
        let end = folder.end().min(row.next.max(folder.start) + count);
        while row.next < end {
            let to = (row.next.max(folder.start) + 3).min(end);
            for offset in row.next.max(folder.start)..to {
                *row.rows.entry(folder.messages[offset as usize]).or_default() += 1;
            }
            step(row, to);
        }
    }
}

fn play(ops: Vec<Op>) {
    let mut world = World::default();
    let mut first = Folder::default();
    first.open(world.draw());
    let mut hosts = vec![first];
    for op in ops {
        match op {
            Op::Write { host, count } => {
                let host = host % hosts.len();
                for _ in 0..count {
                    let message = world.draw();
                    hosts[host].messages.push(message);
                }
            }
            Op::Deliver { host, count } => {
                let host = host % hosts.len();
                world.deliver(&hosts[host], count);
            }
            Op::Restart { host, lost } => {
                let host = host % hosts.len();
                let keep = hosts[host].messages.len().saturating_sub(lost).max(hosts[host].start as usize);
                hosts[host].messages.truncate(keep);
                let id = world.draw();
                hosts[host].open(id);
            }
            Op::Clone { host } if hosts.len() < 4 => {
                let mut copy = hosts[host % hosts.len()].clone();
                copy.open(world.draw());
                hosts.push(copy);
            }
            Op::Clone { .. } => {}
            Op::Restore { host, from } => {
                let (host, from) = (host % hosts.len(), from % hosts.len());
                let mut copy = hosts[from].clone();
                copy.open(world.draw());
                hosts[host] = copy;
            }
            Op::Trim { host } => {
                let host = host % hosts.len();
                let folder = &mut hosts[host];
                let delivered = |message: &u64| world.database.rows.contains_key(message);
                let start = folder.messages.iter().take_while(|message| delivered(message)).count();
                folder.start = folder.start.max(start as u64);
            }
        }
    }
    // Each host in turn has the sink, and delivers all that it has.
    for folder in &hosts {
        world.deliver(folder, u64::MAX / 2);
        for message in &folder.messages {
            assert!(world.database.rows.contains_key(message), "message {message} was skipped: {folder:?}");
        }
    }
    for (a, b) in hosts.iter().flat_map(|a| hosts.iter().map(move |b| (a, b))) {
        check_common(a, b);
    }
    let twice: Vec<_> = world.database.rows.iter().filter(|(_, rows)| **rows > 1).collect();
    assert!(twice.is_empty(), "(message, rows): {twice:?}");
}

/// A record of all of `a`, compared with `b`.
fn check_common(a: &Folder, b: &Folder) {
    let same = a.messages.iter().zip(&b.messages).take_while(|(a, b)| a == b).count() as u64;
    let record = Lineage::of_all(&a.openings).to_string();
    let common = Lineage::parse(&record).unwrap().common(&b.openings, Offset(b.start)).0;
    let common = common.min(a.end()).min(b.end());
    // Below the first kept message nobody can look.
    assert!(common <= same.max(b.start), "{common}, {same}: {a:?} {b:?}");
    if a.start == 0 && b.start == 0 {
        assert_eq!(common, same, "{a:?} {b:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn no_message_of_any_copy_is_skipped_and_none_is_delivered_twice(ops in ops()) {
        play(ops);
    }
}

fn openings(openings: &[(u64, u64)]) -> Vec<Opening> {
    openings.iter().map(|(id, first)| Opening { id: *id, first: Offset(*first) }).collect()
}

fn locate(lineage: &str, next: u64, log: &[(u64, u64)], start: u64) -> u64 {
    Lineage::parse(lineage).unwrap().locate(Offset(next), &openings(log), Offset(start)).0
}

#[test]
fn a_position_goes_on_where_its_opening_is_the_logs() {
    assert_eq!(locate("a", 70, &[(0xa, 0)], 0), 70);
    assert_eq!(locate("a", 100, &[(0xa, 0), (0xb, 100)], 0), 100);
    assert_eq!(locate("a:100 b", 130, &[(0xa, 0), (0xb, 100), (0xc, 140)], 0), 130);
}

#[test]
fn a_position_of_a_lost_copy_comes_back_to_where_the_copies_part() {
    // Restored at 100, where the lost copy had gone on in the same opening, or in another one.
    assert_eq!(locate("a", 200, &[(0xa, 0), (0xb, 100)], 0), 100);
    assert_eq!(locate("a:150 c", 200, &[(0xa, 0), (0xb, 100)], 0), 100);
    assert_eq!(locate("a:80 c", 200, &[(0xa, 0), (0xb, 100)], 0), 80);
    // Of an emptied log nothing was delivered.
    assert_eq!(locate("a", 200, &[(0xb, 0)], 0), 0);
}

#[test]
fn a_position_below_the_first_kept_message_stays_there() {
    assert_eq!(locate("a", 50, &[(0xb, 100)], 100), 50);
    assert_eq!(locate("a", 50, &[(0xa, 0), (0xb, 100)], 60), 50);
}

#[test]
fn a_position_of_the_first_version_is_believed_up_to_what_the_folder_had_at_the_start() {
    assert_eq!(locate("", 70, &[(0, 0), (0xa, 100)], 0), 70);
    assert_eq!(locate("", 100, &[(0, 0), (0xa, 100), (0xb, 120)], 0), 100);
    // An older folder was put back before the upgrade, and went on since.
    assert_eq!(locate("", 150, &[(0, 0), (0xa, 100), (0xb, 200)], 0), 100);
    // Of a version whose log had openings and whose positions had none.
    assert_eq!(locate("", 70, &[(0xa, 0), (0xb, 50), (0xc, 100)], 0), 70);
    assert_eq!(locate("", 150, &[(0xa, 0), (0xb, 50), (0xc, 100)], 0), 100);
    assert_eq!(locate("", 0, &[(0xa, 0)], 0), 0);
    // It is written down with the next commit, the openings before it too.
    let moved =
        Lineage::default().moved(&openings(&[(0xa, 0), (0xb, 50), (0xc, 100)]), Offset(100), Offset(110));
    assert_eq!(moved, Lineage::parse("a:50 b:100 c"));
}

#[test]
fn a_record_of_a_whole_log_is_believed_as_far_as_the_log_is_the_same() {
    let common = |before: &[(u64, u64)], now: &[(u64, u64)]| {
        Lineage::of_all(&openings(before)).common(&openings(now), Offset(0)).0
    };
    let before = [(0xa, 0), (0xb, 100)];
    assert_eq!(common(&before, &[(0xa, 0), (0xb, 100), (0xc, 140)]), 140, "it goes on");
    assert_eq!(common(&before, &[(0xa, 0), (0xb, 100), (0xc, 120), (0xd, 300)]), 120, "its end is lost");
    assert_eq!(common(&before, &[(0xa, 0), (0xc, 80), (0xd, 300)]), 80, "an older copy");
    assert_eq!(common(&before, &[(0xc, 0), (0xd, 50)]), 0, "an empty copy");
    // 0.1.0 drew no openings; this one was upgraded from it.
    assert_eq!(common(&[(0, 0), (0xb, 100)], &[(0, 0), (0xc, 60), (0xd, 200)]), 60);
    // Before there was a record: as much as the folder had at the start.
    assert_eq!(locate("", u64::MAX, &[(0xa, 0), (0xb, 100)], 0), 100);
}

#[test]
fn what_a_log_forgot_the_openings_of_is_believed() {
    // A host that was started hundreds of times while the database was away.
    assert_eq!(locate("a", 70, &[(0, 40), (0xb, 100), (0xc, 120)], 40), 70);
    assert_eq!(locate("a", 170, &[(0, 40), (0xb, 100), (0xc, 120)], 40), 100);
    let lineage = Lineage::parse("a").unwrap();
    let moved = lineage.moved(&openings(&[(0xb, 100)]), Offset(70), Offset(80)).unwrap();
    assert_eq!(moved, Lineage::parse("a:70 0").unwrap(), "it is of no opening that is known");
}

#[test]
fn a_lineage_is_bounded_and_keeps_the_newest() {
    let mut lineage = Lineage::default();
    for n in 1..3_000 {
        let log = openings(&[(n, n * 10)]);
        lineage = lineage.moved(&log, Offset(n * 10), Offset(n * 10 + 1)).unwrap();
    }
    assert_eq!(lineage.entries.len(), ENTRIES_MAX);
    assert_eq!(lineage.entries.last().unwrap().opening, 2_999);
    let text = lineage.to_string();
    assert!(text.len() < 40 * ENTRIES_MAX);
    assert_eq!(Lineage::parse("no hex"), None);
    assert_eq!(Lineage::parse("a:x"), None);
}

#[test]
fn a_position_that_a_person_sets_back_is_believed() {
    let log = openings(&[(0xa, 0), (0xb, 100)]);
    let lineage = Lineage::default().moved(&log, Offset(0), Offset(150)).unwrap();
    assert_eq!(lineage.to_string(), format!("{:016x}:100 {:016x}", 0xa, 0xb));
    assert_eq!(lineage.locate(Offset(120), &log, Offset(0)), Offset(120));
}
