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
        let wanted = |pipeline: &&Arc<Handle>| request.pipeline.as_deref().is_none_or(|name| name == pipeline.name());
        let pipelines: Vec<_> = self.0.iter().filter(wanted).collect();
        if pipelines.is_empty() {
            let name = request.pipeline.as_deref().unwrap_or_default();
            return Err(RedriveError::NotFound(format!("no pipeline \"{name}\" runs here")));
        }
        let ids = (!request.ids.is_empty()).then(|| request.ids.iter().copied().map(Offset).collect());
        let filter = Filter { sink: request.sink, step: request.step, ids };
        let mut answer = RedriveAnswer::default();
        for pipeline in pipelines {
            let summary = pipeline
                .redrive(&filter)
                .await
                .map_err(|error| RedriveError::Unavailable(format!("pipeline \"{}\": {error}", pipeline.name())))?;
            answer.sent += summary.sent;
            answer.refused += summary.refused;
            answer.failed.extend(summary.failed);
        }
        Ok(answer)
    }
}
