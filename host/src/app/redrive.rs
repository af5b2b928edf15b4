//! Dead letters sent again, by request to the running host.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;

use crate::admin::{DiscardAnswer, Redrive, RedriveAnswer, RedriveError, RedriveRequest};
use crate::batch::Offset;
use crate::pipeline::{Filter, Handle};

pub struct Redrives(pub Vec<Arc<Handle>>);

#[async_trait]
impl Redrive for Redrives {
    async fn redrive(&self, request: RedriveRequest) -> Result<RedriveAnswer, RedriveError> {
        let wanted = |pipeline: &&Arc<Handle>| {
            let is_its = |name| pipeline.names().iter().any(|own| own == name);
            request.pipeline.as_deref().is_none_or(is_its)
        };
        let pipelines: Vec<_> = self.0.iter().filter(wanted).collect();
        if pipelines.is_empty() {
            let name = request.pipeline.as_deref().unwrap_or_default();
            return Err(RedriveError::NotFound(format!("no pipeline \"{name}\" runs here")));
        }
        if let Some(sink) = &request.sink
            && !pipelines.iter().any(|pipeline| pipeline.knows_sink(sink))
        {
            let known: BTreeSet<_> = pipelines.iter().flat_map(|pipeline| pipeline.sinks()).collect();
            let known = known.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(RedriveError::NotFound(format!("no sink \"{sink}\", known are {known}")));
        }
        let ids = (!request.ids.is_empty()).then(|| request.ids.iter().copied().map(Offset).collect());
        let possible_duplicates = request.possible_duplicates;
        let RedriveRequest { sink, step, from_step, .. } = request;
        let filter = Filter { sink, step, ids, possible_duplicates, from_step };
        let mut answer = RedriveAnswer::default();
        let mut unavailable = Vec::new();
        for pipeline in &pipelines {
            // A task of its own: who asked may hang up, while it has borrowed a sink.
            let (handle, filter) = (Arc::clone(pipeline), filter.clone());
            let task = tokio::spawn(async move { handle.redrive(&filter).await });
            let reason = match task.await {
                Ok(Ok(summary)) => {
                    answer.sent += summary.sent;
                    answer.refused += summary.refused;
                    answer.letters_sent += summary.letters.sent;
                    answer.letters_refused += summary.letters.refused;
                    answer.letters_new += summary.new;
                    answer.letters_pending += summary.letters.pending;
                    answer.letters_sent_before += summary.letters.sent_before;
                    answer.letters_possible_duplicates += summary.letters.possible_duplicates;
                    answer.failed.extend(summary.failed);
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            unavailable.push(format!("pipeline \"{}\": {reason}", pipeline.name()));
        }
        if unavailable.len() == pipelines.len() {
            return Err(RedriveError::Unavailable(unavailable.join("; ")));
        }
        // What the others sent counts all the same.
        answer.failed.extend(unavailable);
        Ok(answer)
    }

    /// Discards letters of any pipeline: nobody can send those of one that the host has no more.
    async fn discard(&self, request: RedriveRequest) -> Result<DiscardAnswer, RedriveError> {
        let Some((first, others)) = self.0.split_first() else {
            return Err(RedriveError::NotFound("no pipeline runs here".to_owned()));
        };
        let ids = (!request.ids.is_empty()).then(|| request.ids.iter().copied().map(Offset).collect());
        let filter = Filter { sink: request.sink, step: request.step, ids, ..Filter::default() };
        let busy = || RedriveError::Unavailable("a redrive runs: try again once it has ended".to_owned());
        let held: Option<Vec<_>> = others.iter().map(|pipeline| pipeline.without_redrives()).collect();
        let _held = held.ok_or_else(busy)?;
        let discarded = first.discard(&filter, request.pipeline.as_deref()).await;
        let discarded = discarded.map_err(|error| RedriveError::Unavailable(error.to_string()))?;
        Ok(DiscardAnswer { discarded: discarded.ok_or_else(busy)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::tests::harness::{Act, World, broken_step, chain, step};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_one_pipeline_sent_counts_where_another_cannot_send() {
        let (world, without_steps) = (World::new(1, &[("default", "w")]), World::new(1, &[("default", "w")]));
        let process = world.start(chain(1, &[step("check", |_, _| Act::Refuse("no".to_owned()))])).await;
        world.publish_many(1, 0, 10);
        process.drained().await;
        let broken = without_steps.start(chain(1, &[broken_step("check", |worker| worker == 0)])).await;
        process.chain.send_replace(chain(2, &[step("check", |_, _| Act::Pass)]));
        process.until("flipped", |status| status.chain == Some(2)).await;
        let (process, broken) = (process.into_handle(), broken.into_handle());
        let redrive = |pipelines: &[&Arc<Handle>]| {
            let redrives = Redrives(pipelines.iter().map(|handle| Arc::clone(handle)).collect());
            async move { redrives.redrive(RedriveRequest::default()).await }
        };
        let error = redrive(&[&broken]).await.unwrap_err();
        assert!(matches!(error, RedriveError::Unavailable(_)), "{error}");
        let answer = redrive(&[&process, &broken]).await.unwrap();
        assert_eq!((answer.sent, answer.refused), (10, 0));
        assert!(answer.failed[0].contains("has no steps yet"), "{:?}", answer.failed);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_sink_that_is_not_there_is_told_with_the_known_ones() {
        let world = World::new(1, &[("default", "warehouse"), ("alert", "alerts")]);
        let process = world.start(chain(1, &[])).await.into_handle();
        let request = RedriveRequest { sink: Some("warehous".to_owned()), ..RedriveRequest::default() };
        let error = Redrives(vec![process]).redrive(request).await.unwrap_err();
        assert!(matches!(error, RedriveError::NotFound(_)), "{error}");
        assert_eq!(error.to_string(), "no sink \"warehous\", known are alerts, warehouse");
    }
}
