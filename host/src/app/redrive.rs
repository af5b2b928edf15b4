//! Dead letters sent again, by request to the running host.

use std::sync::Arc;

use async_trait::async_trait;

use crate::admin::{Redrive, RedriveAnswer, RedriveError, RedriveRequest};
use crate::batch::Offset;
use crate::pipeline::{Filter, Handle};

pub struct Redrives(pub Vec<Arc<Handle>>);

#[async_trait]
impl Redrive for Redrives {
    async fn redrive(&self, request: RedriveRequest) -> Result<RedriveAnswer, RedriveError> {
        let wanted =
            |pipeline: &&Arc<Handle>| request.pipeline.as_deref().is_none_or(|name| name == pipeline.name());
        let pipelines: Vec<_> = self.0.iter().filter(wanted).collect();
        if pipelines.is_empty() {
            let name = request.pipeline.as_deref().unwrap_or_default();
            return Err(RedriveError::NotFound(format!("no pipeline \"{name}\" runs here")));
        }
        let ids = (!request.ids.is_empty()).then(|| request.ids.iter().copied().map(Offset).collect());
        let filter = Filter { sink: request.sink, step: request.step, ids };
        let mut answer = RedriveAnswer::default();
        for pipeline in pipelines {
            let unavailable = |error: String| {
                RedriveError::Unavailable(format!("pipeline \"{}\": {error}", pipeline.name()))
            };
            // A task of its own: who asked may hang up, while it has borrowed a sink.
            let (handle, filter) = (Arc::clone(pipeline), filter.clone());
            let task = tokio::spawn(async move { handle.redrive(&filter).await });
            let summary = match task.await {
                Ok(redriven) => redriven.map_err(|error| unavailable(error.to_string()))?,
                Err(error) => return Err(unavailable(error.to_string())),
            };
            answer.sent += summary.sent;
            answer.refused += summary.refused;
            answer.failed.extend(summary.failed);
        }
        Ok(answer)
    }
}
