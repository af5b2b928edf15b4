//! Members that do anything, and a host that is killed behind each append, also before the sessions that
//! another kill left have caught up.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Do {
    /// A member whose session is kept, or not.
    Join(bool),
    Leave(usize),
    /// It resumes its session if it has one.
    Come(usize),
    End(usize),
    Unsubscribe(usize),
    /// It comes back with a session that ends with its connection.
    KeepNoMore(usize),
    /// It subscribes once more, with this QoS.
    Subscribe(usize, u8),
    Publish(usize),
    Acknowledge(usize, u16),
    Note(usize),
    /// House-keeping looks at all sessions and records.
    Sweep,
    /// The disk has no space from now on, or has it again.
    NoSpace(bool),
    /// The host is killed, and another starts, which catches up later.
    Restart,
    /// The lanes go on, in so many turns.
    CatchUp(usize),
}

fn steps_after_restarts() -> impl Strategy<Value = Do> {
    prop_oneof![
        6 => steps().prop_map(|step| match step {
            // What is sent with QoS 0 is nowhere any more.
            Do::Subscribe(at, 0) => Do::Subscribe(at, 1),
            step => step,
        }),
        1 => Just(Do::Restart),
        1 => (1..6_usize).prop_map(Do::CatchUp),
    ]
}

fn steps() -> impl Strategy<Value = Do> {
    prop_oneof![
        1 => any::<bool>().prop_map(Do::NoSpace),
        2 => any::<bool>().prop_map(Do::Join),
        2 => (0..5_usize).prop_map(Do::Leave),
        2 => (0..5_usize).prop_map(Do::Come),
        1 => (0..5_usize).prop_map(Do::End),
        1 => (0..5_usize).prop_map(Do::Unsubscribe),
        1 => (0..5_usize).prop_map(Do::KeepNoMore),
        1 => (0..5_usize, 0..3_u8).prop_map(|(member, qos)| Do::Subscribe(member, qos)),
        3 => (1..30_usize).prop_map(Do::Publish),
        1 => (60..150_usize).prop_map(Do::Publish),
        4 => (0..5_usize, 1..20_u16).prop_map(|(member, id)| Do::Acknowledge(member, id)),
        3 => (0..5_usize).prop_map(Do::Note),
        2 => Just(Do::Sweep),
    ]
}

struct Run {
    world: World,
    /// Beside each the member where its client is there.
    members: Vec<(Arc<Session>, Option<Member>)>,
    /// Number of members that have joined.
    joined: usize,
    /// What members have or are owed, from a restart until all have caught up.
    owed: Offsets,
}

impl Run {
    /// The host was killed, and another starts.
    async fn restart(&mut self) {
        let store = self.world.store.clone();
        self.owed = after_a_crash(&self.world, copy(&self.world)).await.into_iter().collect();
        self.world.broker = broker(&Config::default(), self.world.stream.clone(), store);
        let sessions = &self.world.broker.sessions;
        let found = self.members.iter().filter_map(|(member, _)| sessions.get(&member.client_id));
        self.members = found.map(|session| (session, None)).collect();
    }

    async fn catch_up(&self, turns: usize) {
        let mut lanes = Box::pin(catch_up(self.world.broker.clone(), 0));
        for _ in 0..turns {
            if (&mut lanes).now_or_never().is_some() {
                return;
            }
        }
    }

    /// What members have, and are still to be offered.
    fn expected(&mut self) -> Offsets {
        let live = &self.world.broker.live;
        // Nobody is left to get it.
        if live.members(SHARE).0 == 0 {
            self.owed.clear();
        }
        let mut expected = held(&self.world);
        expected.extend(&self.owed);
        expected
    }

    async fn join(&mut self, is_kept: bool) {
        let expiry_s = if is_kept { 600 } else { 0 };
        self.joined += 1;
        let member = self.world.member_for(&format!("m{}", self.joined), expiry_s).await;
        self.world.broker.live.resume(&member.session);
        self.members.push((member.session.clone(), Some(member)));
    }

    async fn leave(&mut self, at: usize) {
        if let Some(member) = self.members[at].1.take() {
            self.world.close(member).await;
        }
    }

    async fn come(&mut self, at: usize, expiry_s: u32) {
        self.leave(at).await;
        let member = self.world.member_for(&self.members[at].0.client_id.clone(), expiry_s).await;
        self.world.broker.live.resume(&member.session);
        self.members[at] = (member.session.clone(), Some(member));
    }

    async fn step(&mut self, step: &Do) {
        let count = self.members.len();
        let broker = self.world.broker.clone();
        match *step {
            Do::Join(is_kept) if count < 5 => self.join(is_kept).await,
            Do::NoSpace(is_full) => self.world.store.set_no_space(is_full),
            Do::CatchUp(turns) => self.catch_up(turns).await,
            Do::Publish(count) => self.world.publish_with(count, &[1, 2]).await,
            Do::Leave(at) if at < count => self.leave(at).await,
            Do::Come(at) if at < count => self.come(at, 600).await,
            Do::Note(at) if at < count => self.members[at].0.note(&broker, Vec::new()),
            Do::Sweep => broker.sessions.sweep(&broker).await,
            Do::Acknowledge(at, id) if at < count && self.members[at].1.is_some() => {
                let before = held(&self.world);
                acknowledge(&self.world, &self.members[at].0, id);
                let now = held(&self.world);
                self.owed.retain(|offset| now.contains(offset) || !before.contains(offset));
            }
            Do::KeepNoMore(at) if at < count => self.come(at, 0).await,
            Do::Subscribe(at, qos) if at < count && self.members[at].1.is_some() => {
                self.world.subscribe(&self.members[at].0, qos);
            }
            Do::Unsubscribe(at) if at < count => {
                _ = broker.live.unsubscribe(&broker, &self.members[at].0, SHARE).await;
                self.members[at].0.note(&broker, Vec::new());
            }
            Do::End(at) if at < count => {
                self.leave(at).await;
                broker.sessions.delete(&broker, &self.members[at].0.client_id.clone()).await;
            }
            _ => {}
        }
    }
}

/// Returns what a host has lost that was killed behind any append since the last time that this was asked,
/// of what members had `before` and have `now`. Where no member's session is kept, nothing can be.
async fn lost(world: &World, before: &Offsets, now: &Offsets) -> Offsets {
    let both: Offsets = before.intersection(now).copied().collect();
    let crashes = world.store.crashes().into_iter().map(|store| (store, &both));
    let mut lost = Offsets::new();
    for (store, held) in crashes.chain([(copy(world), now)]) {
        let again = restarted(world, store).await;
        if [world.broker.as_ref(), again.as_ref()].iter().all(|it| it.live.members(SHARE).0 > 0) {
            let found: Offsets = had_by_all(&again).into_iter().collect();
            lost.extend(held.difference(&found));
        }
    }
    lost
}

/// Runs the steps, with house-keeping wherever others have their turn. A step that waits for space gets it
/// in the end. Returns what a host has lost that was killed at any moment, or at none.
async fn run(steps: &[Do]) -> Option<(usize, Offsets)> {
    let mut run = Run { world: World::new(), members: Vec::new(), joined: 0, owed: Offsets::new() };
    run.join(true).await;
    run.join(true).await;
    run.world.store.keep_states();
    for (number, step) in steps.iter().enumerate() {
        if let Do::Restart = step {
            run.restart().await;
        }
        let mut before = run.expected();
        let world = run.world.clone();
        let owed = run.owed.clone();
        let mut done = Box::pin(run.step(step));
        let mut is_done = false;
        for turn in 0.. {
            is_done |= (&mut done).now_or_never().is_some();
            if is_done {
                break;
            }
            let mut now = held(&world);
            now.extend(owed.iter().filter(|_| world.broker.live.members(SHARE).0 > 0));
            let lost = lost(&world, &before, &now).await;
            if !lost.is_empty() {
                return Some((number, lost));
            }
            before = now;
            note_all(&world);
            if turn == 20 {
                world.store.set_no_space(false);
            }
        }
        drop(done);
        let now = run.expected();
        let lost = lost(&run.world, &before, &now).await;
        if !lost.is_empty() {
            return Some((number, lost));
        }
        if run.world.broker.live.lanes.load(Ordering::Acquire) == 0 {
            let held = held(&run.world);
            let lost: Offsets = run.owed.difference(&held).copied().collect();
            if !lost.is_empty() {
                return Some((number, lost));
            }
            run.owed.clear();
        }
    }
    None
}

fn assert_nothing_is_lost(steps: &[Do]) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let lost = runtime.block_on(run(steps));
    prop_assert!(lost.is_none(), "lost by a step: {lost:?}");
    Ok(())
}

#[test]
fn a_crash_loses_nothing_where_one_of_these_sequences_did() {
    use Do::*;
    let sequences: &[&[Do]] = &[
        &[Join(true), Join(false), Publish(14), KeepNoMore(2), Come(3), Leave(0), Leave(0), Leave(3)],
        &[Publish(21), Acknowledge(0, 1), Join(false), Join(false), KeepNoMore(0)],
        &[Subscribe(0, 0), Publish(2), Note(1)],
        // A record behind whose positions an heir is offered nothing again.
        &[Join(false), Publish(15), Come(0)],
        // A session gives what it holds to one that ends with its connection.
        &[Publish(1), KeepNoMore(0), Leave(1)],
        // A session that ends is on its way out of the share, and holds more than moves in one go.
        &[Leave(1), Join(false), Leave(0), Publish(65), Leave(2)],
        // What was sent stays with a session that is kept no more.
        &[Publish(21), Acknowledge(0, 11), KeepNoMore(0)],
        // One without a kept session joins while no member's is kept, beside a record.
        &[Join(false), End(0), End(1), Join(false), Come(1), Publish(20), End(2), Sweep],
    ];
    for steps in sequences {
        assert_nothing_is_lost(steps).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn a_second_crash_before_all_have_caught_up_loses_nothing_whoever_comes_and_leaves(
        steps in prop::collection::vec(steps_after_restarts(), 1..30),
    ) {
        assert_nothing_is_lost(&steps)?;
    }

    #[test]
    fn a_crash_at_any_moment_loses_nothing_of_a_share_whoever_comes_and_leaves(
        steps in prop::collection::vec(steps(), 1..30),
    ) {
        assert_nothing_is_lost(&steps)?;
    }
}
