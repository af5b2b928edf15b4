//! Makes instances of chains: for all workers, or for none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinHandle;

use super::worker::Steps;
use crate::problems::step_problems;
use crate::step::{Chain, Recall, RecallError};

/// Why a version holds that held in an earlier process.
const HELD_BEFORE: &str = "a step held before the restart, and the change of it waits for a sink that lags";

/// What instances are made of.
pub enum Wanted {
    Chain(Chain),
    /// Of a version before the newest one, whose steps are made again first.
    Older(Vec<String>),
    /// Of the newest version of an earlier process, and whether it waited at a message for the next.
    Newest(Vec<String>, bool),
}

/// Each chain that was wanted, with its steps for a lane's workers.
pub type Made = Result<Vec<(Chain, Vec<Steps>)>, NotMade>;

/// Why no instances were made.
pub enum NotMade {
    /// The place of the first version that does not start, and why; this may pass.
    Start(usize, String),
    /// The place of a version that cannot be made again by whatever process, and why.
    Gone(usize, String),
}

/// Instances of chains that are being made. Dropping it makes no more of them.
pub struct Making {
    task: JoinHandle<Made>,
    given_up: Arc<AtomicBool>,
}

impl Making {
    /// Begins instances of each chain for all `workers` of a lane, off the async threads:
    /// initialising each may take a plugin's whole limit, and one that is made again may have to be
    /// compiled.
    pub fn start(wanted: Vec<Wanted>, workers: u16, recall: Recall) -> Self {
        let given_up = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&given_up);
        let make_one = move |chain: &Chain, worker| match ends.load(Ordering::Relaxed) {
            false => one(chain, worker),
            true => Err("given up".to_owned()),
        };
        let make = move || {
            let made = wanted.into_iter().enumerate().map(|(place, wanted)| {
                let is_made_again = !matches!(wanted, Wanted::Chain(_));
                let chain = chain(wanted, &recall).map_err(|error| match error {
                    RecallError::Gone(why) => NotMade::Gone(place, why),
                    RecallError::Later(why) => NotMade::Start(place, why),
                })?;
                let steps = (0..workers).map(|worker| make_one(&chain, worker)).collect::<Result<_, _>>();
                let not_started =
                    |why| NotMade::Start(place, if is_made_again { of_earlier(why) } else { why });
                Ok((chain, steps.map_err(not_started)?))
            });
            made.collect()
        };
        Self { task: tokio::task::spawn_blocking(make), given_up }
    }

    /// Safe to drop; not to be called again once it has returned.
    pub async fn finished(&mut self) -> Made {
        match (&mut self.task).await {
            Ok(made) => made,
            // Which of them is not known; the first is needed by the fewest sinks.
            Err(_) => Err(NotMade::Start(0, "making the steps panicked: see the log".to_owned())),
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

fn chain(wanted: Wanted, recall: &Recall) -> Result<Chain, RecallError> {
    let again = |recipes: Vec<String>, hold| {
        let steps = recipes.iter().map(|recipe| recall(recipe)).collect::<Result<_, _>>()?;
        Ok(Chain { generation: 0, steps, hold })
    };
    match wanted {
        Wanted::Chain(chain) => Ok(chain),
        Wanted::Older(recipes) => {
            let chain = again(recipes, None)?;
            chain.steps.iter().for_each(|step| step.let_go());
            Ok(chain)
        }
        Wanted::Newest(recipes, holds) => again(recipes, holds.then(|| HELD_BEFORE.into())),
    }
}

/// Says what to do where steps that ran earlier messages can never start again: no host can tell that.
fn of_earlier(why: String) -> String {
    format!(
        "{why}; it ran messages before that a sink has still to get: if it can never start again, remove its file from \
         plugin-files of the data folder, and newer steps run them"
    )
}

fn one(chain: &Chain, worker: u16) -> Result<Steps, String> {
    let mut steps = Vec::with_capacity(chain.steps.len());
    for factory in chain.steps.iter() {
        let made = factory.instantiate(u32::from(worker)).map_err(|problems| {
            format!("{} cannot start: {}", factory.describe(), step_problems(&problems))
        })?;
        steps.push(made);
    }
    Ok(Steps::new(steps, chain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::tests::harness::broken_step;

    #[tokio::test]
    async fn it_is_told_how_to_give_up_steps_of_earlier_messages_that_do_not_start() {
        let recall: Recall = Arc::new(|_| Ok(broken_step("late", |_| true)));
        let wanted = vec![Wanted::Older(vec!["0".to_owned()])];
        let Err(NotMade::Start(0, why)) = Making::start(wanted, 1, recall).finished().await else {
            panic!("it starts, or is gone")
        };
        assert!(why.contains("late cannot start") && why.contains("plugin-files"), "{why}");
    }
}
