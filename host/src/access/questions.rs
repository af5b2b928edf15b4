//! Questions that a client's rules leave open (`ask`): asked of the plugin that decides them, with the
//! answers kept as long as the client's rights.
//!
//! Nothing waits here. A caller that meets an open question suspends its work, has the question asked,
//! and continues when there is an answer. Each connection has one running call at a time.

use std::collections::HashMap;
use std::fmt;
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;

use super::Denied;
use super::rules::Verdict;
use crate::room::{Holding, Room};

/// Most questions of one call. A listener asks no more at a time.
pub const QUESTIONS_MAX: usize = 1_024;
/// Most bytes of answers that are kept for one client. The answers of the last call are kept whatever
/// their size.
const ANSWERS_BYTES_MAX: usize = 256 << 10;
/// Most bytes of answers of all clients together. A client without room keeps only those of its last
/// call.
pub const ANSWERS_OF_ALL_BYTES_MAX: usize = 128 << 20;
/// Approximate size of an answer beside its topic.
const ANSWER_BYTES: usize = 64;
/// How long the actions of a failed call stay denied before the plugin is asked again.
const FAILED_FOR: Duration = Duration::from_secs(1);

/// What a client wants to do with a topic. The numbers are those of the plugin contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Publish = 1,
    Subscribe = 2,
    Receive = 4,
}

/// Decides the questions that rules leave open.
#[async_trait]
pub trait Authorize: Send + Sync {
    /// Returns whether client `client_id`, known as `name`, may act: one answer for each topic (for
    /// `Subscribe`, a filter). An error answers none of them.
    async fn authorize(
        &self,
        name: &str,
        client_id: &str,
        act: Act,
        topics: &[Box<str>],
    ) -> Result<Vec<bool>, Denied>;
}

/// The questions and answers of one client.
pub struct Questions {
    asker: Asker,
    /// Answers by topic.
    answers: HashMap<Box<str>, Answer>,
    bytes: usize,
    /// The client's part of the memory for the answers of all clients.
    memory: Holding,
    running: Option<AbortOnDropHandle<Answered>>,
    /// Whether some of the session's subscriptions were denied.
    pub narrowed: bool,
}

#[derive(Clone)]
struct Asker {
    authorizer: Arc<dyn Authorize>,
    name: Arc<str>,
    client_id: Arc<str>,
    /// Time after which a call counts as failed.
    wait_max: Duration,
}

#[derive(Clone, Copy, Default)]
struct Answer {
    /// Actions whose answer is known.
    known: u8,
    /// Actions among the known ones that are allowed.
    allowed: u8,
    /// Time until which the answer holds, after a call that failed.
    until: Option<Instant>,
}

struct Answered {
    act: Act,
    topics: Vec<Box<str>>,
    /// Answers; `None` if the call failed.
    answers: Vec<Option<bool>>,
    /// Reason why the first failed call failed.
    denied: Option<Denied>,
}

impl Questions {
    /// Creates the questions of a client, whose answers count in `room` with those of all clients.
    pub fn new(
        authorizer: Arc<dyn Authorize>,
        name: &Arc<str>,
        client_id: &str,
        wait_max: Duration,
        room: &Arc<Room>,
    ) -> Self {
        let asker = Asker { authorizer, name: name.clone(), client_id: client_id.into(), wait_max };
        let memory = Holding::of(room);
        Self { asker, answers: HashMap::new(), bytes: 0, memory, running: None, narrowed: false }
    }

    /// Returns the known answer, or `Verdict::Ask`. Does not allocate.
    pub fn known(&self, act: Act, topic: &str) -> Verdict {
        let Some(answer) = self.answers.get(topic) else { return Verdict::Ask };
        let is_over = || answer.until.is_some_and(|until| Instant::now() >= until);
        match answer {
            _ if answer.known & act as u8 == 0 || is_over() => Verdict::Ask,
            _ if answer.allowed & act as u8 != 0 => Verdict::Yes,
            _ => Verdict::No,
        }
    }

    /// Begins a call, unless one is running, whose end must be awaited first. The call runs on a task of
    /// its own, so that a client that does something else meanwhile does not keep the turn of another.
    pub fn ask(&mut self, act: Act, topics: Vec<Box<str>>) {
        if self.running.is_none() && !topics.is_empty() {
            let call = tokio::spawn(self.asker.clone().ask(act, topics));
            self.running = Some(AbortOnDropHandle::new(call));
        }
    }

    pub fn is_asking(&self) -> bool {
        self.running.is_some()
    }

    /// Returns when there are answers. Never returns while no call runs. Cancel safe.
    pub async fn answered(&mut self) {
        let Some(running) = &mut self.running else { return pending().await };
        // Fails only while the runtime ends.
        let Ok(answered) = running.await else { return pending().await };
        self.running = None;
        self.learn(answered);
    }

    /// Asks and waits, in as many calls as needed. An error means that one of them failed.
    pub async fn ask_now(&mut self, act: Act, topics: Vec<Box<str>>) -> Result<(), Denied> {
        let mut answers = Vec::new();
        for some in topics.chunks(QUESTIONS_MAX) {
            let answered = self.asker.clone().ask(act, some.to_vec()).await;
            if answered.answers.contains(&None) {
                return Err(answered.denied.unwrap_or(Denied::Unavailable("plugin")));
            }
            answers.extend(answered.answers);
        }
        self.learn(Answered { act, topics, answers, denied: None });
        Ok(())
    }

    fn learn(&mut self, answered: Answered) {
        let Answered { act, topics, answers, denied: _ } = answered;
        self.make_room(topics.iter().map(|topic| topic.len() + ANSWER_BYTES).sum());
        let act = act as u8;
        for (topic, said) in topics.into_iter().zip(answers) {
            let len = topic.len();
            let answer = self.answers.entry(topic).or_insert_with(|| {
                self.bytes += len + ANSWER_BYTES;
                Answer::default()
            });
            if said.is_none() || answer.until.is_some() {
                // What is known of other acts is asked for again, rather than kept by another's time.
                *answer = Answer::default();
            }
            answer.until = said.is_none().then(|| Instant::now() + FAILED_FOR);
            answer.known |= act;
            answer.allowed &= !act;
            if said == Some(true) {
                answer.allowed |= act;
            }
        }
        self.memory.hold(self.bytes);
    }

    /// Makes room for `wanted` bytes by forgetting arbitrary answers.
    fn make_room(&mut self, wanted: usize) {
        let mut bytes = self.bytes;
        let is_there = bytes + wanted <= ANSWERS_BYTES_MAX;
        if is_there && self.memory.try_hold(bytes + wanted) {
            return;
        }
        let bytes_max = if is_there { 0 } else { ANSWERS_BYTES_MAX };
        self.answers.retain(|topic, _| {
            let stays = bytes + wanted <= bytes_max;
            if !stays {
                bytes -= topic.len() + ANSWER_BYTES;
            }
            stays
        });
        self.bytes = bytes;
    }
}

impl Asker {
    /// Asks about all topics in one call. If the call fails, it asks about each topic separately, so
    /// that one topic on which the plugin fails does not deny the others.
    async fn ask(self, act: Act, topics: Vec<Box<str>>) -> Answered {
        let until = tokio::time::Instant::now() + self.wait_max;
        let mut answers: Vec<Option<bool>> = Vec::new();
        let called = self.call(act, &topics, until).await;
        let denied = called.as_ref().err().copied();
        match called {
            Ok(all) => answers.extend(all.into_iter().map(Some)),
            Err(_) if topics.len() == 1 => {}
            Err(_) => {
                for topic in &topics {
                    let one = self.call(act, std::slice::from_ref(topic), until).await;
                    answers.push(one.ok().and_then(|one| one.first().copied()));
                }
            }
        }
        answers.resize(topics.len(), None);
        Answered { act, topics, answers, denied }
    }

    async fn call(
        &self,
        act: Act,
        topics: &[Box<str>],
        until: tokio::time::Instant,
    ) -> Result<Vec<bool>, Denied> {
        let call = self.authorizer.authorize(&self.name, &self.client_id, act, topics);
        tokio::time::timeout_at(until, call).await.unwrap_or(Err(Denied::Unavailable("plugin")))
    }
}

impl fmt::Debug for Questions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Questions").field("answers", &self.answers.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::FutureExt;
    use tokio::sync::Notify;

    use super::*;

    /// Allows what begins with `y`, fails where a topic is `bad`, answers `yslow` when it is told to.
    #[derive(Default)]
    struct Fake(Mutex<Vec<String>>, Notify);

    #[async_trait]
    impl Authorize for Fake {
        async fn authorize(
            &self,
            name: &str,
            client_id: &str,
            act: Act,
            topics: &[Box<str>],
        ) -> Result<Vec<bool>, Denied> {
            self.0.lock().unwrap().push(format!("{name} {client_id} {} {}", act as u8, topics.join(",")));
            if topics.iter().any(|topic| &**topic == "bad") {
                return Err(Denied::Unavailable("plugin"));
            }
            if &*topics[0] == "yslow" {
                self.1.notified().await;
            }
            Ok(topics.iter().map(|topic| topic.starts_with('y')).collect())
        }
    }

    fn questions() -> (Arc<Fake>, Questions) {
        let fake = Arc::new(Fake::default());
        (fake.clone(), questions_of(fake, &Room::new(ANSWERS_OF_ALL_BYTES_MAX)))
    }

    fn questions_of(fake: Arc<Fake>, room: &Arc<Room>) -> Questions {
        Questions::new(fake, &"ann".into(), "c", Duration::from_secs(10), room)
    }

    #[tokio::test]
    async fn without_room_among_all_clients_only_the_last_calls_answers_are_kept() {
        let room = Room::new(64 << 10);
        let mut questions: Vec<_> = (0..2).map(|_| questions_of(Arc::default(), &room)).collect();
        let many =
            |head: &str| -> Vec<Box<str>> { (0..200).map(|n| format!("{head}/{n:0100}").into()).collect() };
        let mut ask = async |of: usize, head: &str| {
            questions[of].ask(Act::Receive, many(head));
            questions[of].answered().await;
            questions[of].answers.len()
        };
        assert_eq!(ask(0, "y1").await, 200);
        assert_eq!(ask(1, "y1").await, 200);
        assert_eq!(ask(0, "y2").await, 200, "the others are asked for again");
        assert!(many("y2").iter().all(|topic| questions[0].known(Act::Receive, topic) == Verdict::Yes));
        drop(questions);
        assert_eq!(room.taken(), 0);
    }

    fn topics(topics: &[&str]) -> Vec<Box<str>> {
        topics.iter().map(|topic| (*topic).into()).collect()
    }

    #[tokio::test]
    async fn what_was_answered_is_known_for_its_act_only() {
        let (fake, mut questions) = questions();
        assert_eq!(questions.known(Act::Publish, "yes"), Verdict::Ask);
        questions.ask(Act::Publish, topics(&["yes", "no"]));
        questions.ask(Act::Receive, topics(&["yes"]));
        questions.answered().await;
        assert!(!questions.is_asking());
        assert_eq!(questions.known(Act::Publish, "yes"), Verdict::Yes);
        assert_eq!(questions.known(Act::Publish, "no"), Verdict::No);
        assert_eq!(questions.known(Act::Receive, "yes"), Verdict::Ask);
        assert_eq!(*fake.0.lock().unwrap(), ["ann c 1 yes,no"], "one call at a time");
    }

    #[tokio::test]
    async fn a_wait_that_is_dropped_goes_on_with_the_same_call() {
        let (fake, mut questions) = questions();
        questions.ask(Act::Receive, topics(&["yslow"]));
        assert_eq!(questions.answered().now_or_never(), None);
        assert!(questions.is_asking());
        fake.1.notify_one();
        questions.answered().await;
        assert_eq!(questions.known(Act::Receive, "yslow"), Verdict::Yes);
        assert_eq!(fake.0.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_call_goes_on_while_its_client_is_at_something_else() {
        let (fake, mut questions) = questions();
        questions.ask(Act::Receive, topics(&["yes"]));
        tokio::task::yield_now().await;
        assert_eq!(fake.0.lock().unwrap().len(), 1, "though nobody waits for it");
        questions.answered().await;
        assert_eq!(questions.known(Act::Receive, "yes"), Verdict::Yes);
    }

    #[tokio::test]
    async fn a_call_that_fails_or_takes_too_long_refuses_and_is_not_kept() {
        for topic in ["bad", "yslow"] {
            let (_, mut questions) = questions();
            questions.ask_now(Act::Subscribe, topics(&["yes"])).await.unwrap();
            questions.asker.wait_max = Duration::from_millis(1);
            assert!(questions.ask_now(Act::Publish, topics(&[topic])).await.is_err());
            questions.ask(Act::Publish, topics(&[topic]));
            questions.answered().await;
            let answer = questions.answers.get_mut(topic).unwrap();
            assert_eq!((answer.known, answer.allowed), (Act::Publish as u8, 0));
            answer.until = Some(Instant::now());
            assert_eq!(questions.known(Act::Publish, topic), Verdict::Ask);
            assert_eq!(questions.known(Act::Subscribe, "yes"), Verdict::Yes);
        }
    }

    #[tokio::test]
    async fn one_topic_that_fails_takes_no_other_along() {
        let (_, mut questions) = questions();
        questions.ask(Act::Publish, topics(&["yes", "bad", "no"]));
        questions.answered().await;
        let known = ["yes", "bad", "no"].map(|topic| questions.known(Act::Publish, topic));
        assert_eq!(known, [Verdict::Yes, Verdict::No, Verdict::No]);
        assert!(questions.answers["bad"].until.is_some() && questions.answers["no"].until.is_none());
    }

    #[tokio::test]
    async fn answers_have_a_bound_and_those_of_the_last_call_are_all_there() {
        let (_, mut questions) = questions();
        let many = |head: &str| (0..3_000).map(|n| format!("{head}/{n:0100}").into()).collect::<Vec<_>>();
        for head in ["y", "n", "y2"] {
            questions.ask(Act::Receive, many(head)[..1_000].to_vec());
            questions.answered().await;
            let wanted = if head == "n" { Verdict::No } else { Verdict::Yes };
            assert!(many(head)[..1_000].iter().all(|topic| questions.known(Act::Receive, topic) == wanted));
            let bytes: usize = questions.answers.keys().map(|topic| topic.len() + ANSWER_BYTES).sum();
            assert!(bytes == questions.bytes && bytes <= ANSWERS_BYTES_MAX, "{bytes}");
        }
        questions.ask(Act::Subscribe, many("y"));
        questions.answered().await;
        assert!(many("y").iter().all(|topic| questions.known(Act::Subscribe, topic) == Verdict::Yes));
    }
}
