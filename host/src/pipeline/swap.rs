//! Makes instances of chains: for all workers, or for none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinHandle;

use super::worker::Steps;
use crate::problems::step_problems;
use crate::step::Chain;

/// For each chain the steps of a lane's workers, or why the first step that cannot start refuses all.
pub type Made = Result<Vec<Vec<Steps>>, String>;

/// Instances of chains that are being made. Dropping it makes no more of them.
pub struct Making {
    task: JoinHandle<Made>,
    given_up: Arc<AtomicBool>,
}

impl Making {
    /// Begins instances of each chain for all `workers` of a lane, off the async threads:
    /// initialising each may take a plugin's whole limit.
    pub fn start(chains: Vec<Chain>, workers: u16) -> Self {
        let given_up = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&given_up);
        let make_one = move |chain: &Chain, worker| match ends.load(Ordering::Relaxed) {
            false => one(chain, worker),
            true => Err("given up".to_owned()),
        };
        let of_lane = move |chain: &Chain| (0..workers).map(|worker| make_one(chain, worker)).collect();
        let make = move || chains.iter().map(of_lane).collect();
        Self { task: tokio::task::spawn_blocking(make), given_up }
    }

    /// Safe to drop; not to be called again once it has returned.
    pub async fn finished(&mut self) -> Made {
        match (&mut self.task).await {
            Ok(made) => made,
            Err(_) => Err("making the steps panicked: see the log".to_owned()),
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

fn one(chain: &Chain, worker: u16) -> Result<Steps, String> {
    let mut steps = Vec::with_capacity(chain.steps.len());
    for factory in chain.steps.iter() {
        let made = factory.instantiate(u32::from(worker)).map_err(|problems| {
            format!("{} cannot start: {}", factory.describe(), step_problems(&problems))
        })?;
        steps.push(made);
    }
    Ok(Steps::new(steps, chain.generation))
}
