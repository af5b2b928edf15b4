//! Where a claim goes on in the log.

use crate::sinks::{Advance, Claim};
use crate::stream::Stream;

/// Says that positions were left in another copy of the log, and which messages that concerns.
pub fn say_moved(claim: &Claim, stream: &dyn Stream, advance: &[Advance]) {
    let (back, ahead): (Vec<&Advance>, Vec<&Advance>) = advance.iter().partition(|step| step.to < step.from);
    if let (Some(from), Some(upto)) =
        (back.iter().map(|step| step.to.0).min(), back.iter().map(|step| step.from.0).max())
    {
        let partitions: Vec<u16> = back.iter().map(|step| step.partition.0).collect();
        tracing::error!(
            pipeline = claim.pipeline,
            sink = claim.sink,
            stream = stream.name(),
            from,
            upto,
            ?partitions,
            "the sink was filled from another copy of this data folder (a backup was restored, the folder was copied, \
             or its disk lost the end of the log): the messages at offsets {from} to {last} that it has are not in \
             this folder, and their rows stay. The sink goes on at offset {from}, so that no message of this folder \
             is skipped",
            last = upto - 1
        );
    }
    if let Some(to) = ahead.iter().map(|step| step.to.0).max() {
        tracing::warn!(
            pipeline = claim.pipeline,
            sink = claim.sink,
            stream = stream.name(),
            "another copy of this data folder was delivered meanwhile; of this one the sink has all messages \
             below offset {to}, and goes on there"
        );
    }
}
