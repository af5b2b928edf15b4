//! Makes the instances of a chain: for all workers, or for none.

use super::worker::Steps;
use crate::step::Chain;

/// Instances for `lanes` times `workers`, off the async threads: compiling and
/// initialising may take long. The first step that cannot start refuses all.
pub async fn instantiate(chain: &Chain, workers: u16, lanes: usize) -> Result<Vec<Vec<Steps>>, String> {
    let chain = chain.clone();
    let make = move || (0..lanes).map(|_| (0..workers).map(|worker| one(&chain, worker)).collect()).collect();
    match tokio::task::spawn_blocking(make).await {
        Ok(made) => made,
        Err(_) => Err("making the steps panicked: see the log".to_owned()),
    }
}

fn one(chain: &Chain, worker: u16) -> Result<Steps, String> {
    let mut steps = Vec::with_capacity(chain.steps.len());
    for factory in chain.steps.iter() {
        let made = factory.instantiate(u32::from(worker)).map_err(|problems| {
            let list: Vec<_> =
                problems.iter().map(|p| format!("{}: {}", p.path.as_str(), p.message)).collect();
            format!("{} cannot start: {}", factory.describe(), list.join("; "))
        })?;
        steps.push(made);
    }
    Ok(Steps::new(steps, chain.generation))
}
