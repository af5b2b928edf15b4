//! Where a claim begins in the log, and where it goes on.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::gone::Gone;
use crate::batch::Offset;
use crate::sinks::{Advance, Begin, Claim, Found, Name, OtherLog};
use crate::stream::{BeginNow, Delivered, GapCause, Identity, OnLag, Stream};
use crate::telemetry::{Failures, Standing};

/// The claim of a pipeline on a sink; `pipelines` and `sinks`: the name that it has, then
/// those that it had.
pub fn claim_of(pipelines: &[String], sinks: &[String], identity: Identity) -> Claim {
    let mut names = sinks.iter().flat_map(|sink| pipelines.iter().map(|of| (of.clone(), sink.clone())));
    let (pipeline, sink) = names.next().expect("each has a name");
    let formerly = names.collect();
    let Identity { log, generation, partitions } = identity;
    Claim { pipeline, sink, log, generation, partitions, formerly }
}

/// What the key `begin` of a sink means at this start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstStart {
    Start,
    Now(BeginNow),
}

impl FirstStart {
    /// `now`: what the stream says that `begin: now` means.
    pub fn new(begin: Option<Begin>, now: Option<BeginNow>) -> Option<Self> {
        match begin? {
            Begin::Start => Some(Self::Start),
            Begin::Now => now.map(Self::Now),
        }
    }
}

/// What a claim that is new to its sink needs to know where it begins.
#[derive(Clone, Debug, Default)]
pub struct Beginning {
    pub begin: Option<FirstStart>,
    /// Pipelines and sinks that the host has.
    pub configured: Arc<BTreeSet<Name>>,
    /// Where the pipeline's own stream remembers the sink, which is another stream of this host: its
    /// positions lie with its messages, and are not lost without them. `None` for other sinks.
    pub stream: Option<Offset>,
}

impl Beginning {
    /// Returns where the partitions of a claim begin that have no position, or why a person must
    /// decide. `positions`: how many partitions have one.
    pub fn start(
        &self,
        claim: &Claim,
        positions: usize,
        found: &Found,
        delivered: Delivered,
        kept: &Range<Offset>,
    ) -> Result<Offset, String> {
        // All partitions got a position with the first commit.
        let is_partly_gone = (1..usize::from(claim.partitions)).contains(&positions);
        match self.begin {
            _ if positions > 0 && !is_partly_gone => Ok(kept.start),
            Some(FirstStart::Now(now)) if self.stream.is_some() => {
                self.start_of_stream(claim, found, now, kept)
            }
            Some(FirstStart::Start) => Ok(kept.start),
            Some(FirstStart::Now(BeginNow::At(offset))) => Ok(offset.clamp(kept.start, kept.end)),
            _ if is_partly_gone => Err(claim.partly_gone()),
            Some(FirstStart::Now(BeginNow::Followed)) => Err(claim.begun(kept)),
            None => self.decide(claim, found, delivered, kept),
        }
    }

    /// Returns where a pipeline begins that has no position in a stream that it writes: with what comes
    /// after the first start at which it was to write to it, so that a stream which is added later does not
    /// bring everything a second time to those who had it otherwise. Where it has written before, the
    /// stream was removed with its positions: the pipeline goes on where it was.
    fn start_of_stream(
        &self,
        claim: &Claim,
        found: &Found,
        now: BeginNow,
        kept: &Range<Offset>,
    ) -> Result<Offset, String> {
        // One that is still there has not changed its name: it writes elsewhere now.
        let is_there = |name: &str| self.configured.iter().any(|(pipeline, _)| pipeline == name);
        if let Some((pipeline, _)) = found.others.iter().find(|(pipeline, _)| !is_there(pipeline)) {
            return Err(format!(
                "pipeline \"{}\" has not written to stream \"{}\" yet, and pipeline \"{pipeline}\", which this host does \
                 not have, has written to it what comes from the same stream: set `renamed_from: {pipeline}` in \
                 pipelines.{} to go on where that one was, or let the pipeline write to a stream of another name; \
                 then restart",
                claim.pipeline, claim.sink, claim.pipeline
            ));
        }
        let from = match now {
            BeginNow::At(offset) => offset,
            BeginNow::Followed => self.stream.unwrap_or_default(),
        };
        Ok(from.clamp(kept.start, kept.end))
    }

    /// The claim has positions: from now on `begin: now` is followed.
    pub fn follow(&mut self) {
        if let Some(FirstStart::Now(now)) = &mut self.begin {
            *now = BeginNow::Followed;
        }
    }

    /// Whether a sink whose positions are gone, and its table with them, goes on where this process
    /// knows that it was: what came before `begin: now` is not wanted in the new table either.
    pub fn goes_on(&self) -> bool {
        matches!(self.begin, Some(FirstStart::Now(_)))
    }

    /// Whether a table without positions is believed to have the rows of dead letters that were
    /// sent to it: it has rows, and nobody has said that all is to be written again.
    pub fn believes_sent(&self, found: &Found) -> bool {
        found.has_rows && self.begin != Some(FirstStart::Start)
    }

    /// Returns where a new claim begins, or why a person must decide: the sink's table has rows
    /// that this log may have written under another name, or under positions that are gone.
    fn decide(
        &self,
        claim: &Claim,
        found: &Found,
        delivered: Delivered,
        kept: &Range<Offset>,
    ) -> Result<Offset, String> {
        let choice = format!(
            "set `begin: start` in sinks.{} to write what the stream still has (offsets {} to {}) again from the \
             beginning, or `begin: now` to write only what comes from now on; then restart",
            claim.sink, kept.start.0, kept.end.0
        );
        if !found.has_rows {
            return Ok(kept.start);
        }
        if let Some((pipeline, sink)) = found.others.iter().find(|other| !self.configured.contains(*other)) {
            let mut keys = Vec::new();
            if *sink != claim.sink {
                keys.push(format!("`renamed_from: {sink}` in sinks.{}", claim.sink));
            }
            if *pipeline != claim.pipeline {
                keys.push(format!("`renamed_from: {pipeline}` in pipelines.{}", claim.pipeline));
            }
            return Err(format!(
                "sink \"{}\" of pipeline \"{}\" has no position, and its table was filled from this stream by sink \
                 \"{sink}\" of pipeline \"{pipeline}\", which this host does not have: set {} to go on where that \
                 one was; or {choice}",
                claim.sink,
                claim.pipeline,
                keys.join(" and ")
            ));
        }
        let is_lost = match delivered {
            Delivered::ToThis => true,
            Delivered::ToOthers => found.others.is_empty(),
            Delivered::ToNobody => false,
        };
        if is_lost {
            return Err(format!(
                "the {} are not in headworks_positions, the stream was delivered before, and the table has rows, \
                 or may have rows that the sink does not see, perhaps of this stream: put the rows of headworks_positions back, or set `renamed_from` where the \
                 sink or its pipeline had another name; or {choice}",
                claim.positions_text()
            ));
        }
        Ok(kept.start)
    }
}

/// Says where a claim that is new begins, where that is not the plain first start.
pub fn say_begun(claim: &Claim, stream: &dyn Stream, start: Offset, delivered: Delivered) {
    let kept = stream.bounds();
    if start > kept.start {
        tracing::warn!(
            pipeline = claim.pipeline,
            sink = claim.sink,
            stream = stream.name(),
            "the sink begins at offset {}: what the stream has before it is not written",
            start.0
        );
    } else if delivered != Delivered::ToNobody && kept.start < kept.end {
        tracing::warn!(
            pipeline = claim.pipeline,
            sink = claim.sink,
            stream = stream.name(),
            "the sink begins at offset {} and is written all that the stream still has, up to offset {}",
            start.0,
            kept.end.0
        );
    }
}

/// Kind of the problem that a sink's table was filled from a log that this folder does not have.
const OTHER_LOG: &str = "other_log";

/// Returns what a person has to know of a claim that is new, and that had positions in other logs before:
/// the stream of this folder may be one that was made because the right one is not there. Nothing where the
/// config says where the sink begins.
pub fn other_log(claim: &Claim, found: &Found, begin: Option<FirstStart>) -> Option<Standing> {
    let [OtherLog { log, claimed_at }, ..] = &found.other_logs[..] else { return None };
    if begin.is_some() {
        return None;
    }
    let claimed = claimed_at.as_deref().map(|at| format!(", claimed {at}")).unwrap_or_default();
    let Claim { pipeline, sink, log: ours, .. } = claim;
    Some(Standing {
        part: format!("sink {pipeline}/{sink}"),
        kind: OTHER_LOG,
        cause: format!(
            "headworks_positions has positions of log {log} for this pipeline and sink{claimed}, and the stream of \
             this data folder is log {ours}, which the sink has never had: what only the other log holds is not \
             written"
        ),
        advice: format!(
            "where the stream's folder was moved, or its disk is not mounted, stop the host and put the right one \
             back; where another host fills the table, or the folder was to begin anew, nothing is lost: the next \
             start does not say it again, nor does one with `begin: start` in sinks.{sink}"
        ),
    })
}

/// Says that a new table takes the place of the one before.
pub fn say_goes_on(claim: &Claim, stream: &dyn Stream, positions: &[Offset]) {
    tracing::warn!(
        pipeline = claim.pipeline,
        sink = claim.sink,
        stream = stream.name(),
        "the table and its positions are gone, and a new table takes their place: the sink goes on at offset {}, \
         where it was",
        positions.iter().map(|position| position.0).min().unwrap_or_default()
    );
}

/// Where the stream remembers a reader whose sink was not opened yet.
#[derive(Clone)]
pub struct Waiting {
    pub from: Offset,
    pub on_lag: OnLag,
    pub gone: Arc<Gone>,
}

impl Waiting {
    /// Returns which messages a claim that begins at `start` can never have, and why not.
    pub fn lost(&self, start: Offset) -> Option<(Range<Offset>, GapCause)> {
        let cause = match self.on_lag {
            // Retention waits for such a reader: the disk lost what it lacks.
            OnLag::Block | OnLag::Ask => GapCause::Damaged,
            OnLag::Detach | OnLag::Hold => GapCause::Trimmed,
        };
        (self.from < start).then_some((self.from..start, cause))
    }
}

/// Counts and says messages that a claim can never have; `gone` counts for the claim's pipeline.
pub fn tell_lost(claim: &Claim, stream: &dyn Stream, gone: &Gone, lost: Range<Offset>, cause: GapCause) {
    let (from, to) = (lost.start.0, lost.end.0);
    stream.lose(lost, cause);
    match cause {
        GapCause::Damaged => super::metrics::gap(&claim.pipeline, cause.as_str()).increment(to - from),
        GapCause::Trimmed => gone.count(from..to),
    }
    tracing::error!(
        pipeline = claim.pipeline,
        sink = claim.sink,
        stream = stream.name(),
        from,
        to,
        "the sink was opened for the first time, and does not get messages that are gone meanwhile: {}",
        match cause {
            GapCause::Damaged => "they are damaged or missing on disk",
            GapCause::Trimmed => "retention removed them (on_lag: detach)",
        }
    );
}

/// Says that positions were left in another copy of the log, and which messages that concerns. Where this
/// folder does not have them, that is a problem.
pub fn say_moved(claim: &Claim, stream: &dyn Stream, advance: &[Advance], failures: &Failures) {
    let back: Vec<&Advance> = advance.iter().filter(|step| step.to < step.from).collect();
    let ahead = advance.iter().filter(|step| step.to > step.from);
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
        failures.stands(Standing {
            part: format!("sink {}/{}", claim.pipeline, claim.sink),
            kind: OTHER_LOG,
            cause: format!(
                "the sink was filled from another copy of this data folder: it has rows of the messages at offsets \
                 {from} to {} of stream \"{}\", which are not in this folder",
                upto - 1,
                stream.name()
            ),
            advice: "where the newest copy of the folder is elsewhere (its disk is not mounted, an older backup was \
                     put back), stop the host and put that one back; else nothing is to be done: the rows stay, and \
                     the next start does not say it again"
                .to_owned(),
        });
    }
    if let Some(to) = ahead.map(|step| step.to.0).max() {
        tracing::warn!(
            pipeline = claim.pipeline,
            sink = claim.sink,
            stream = stream.name(),
            "another copy of this data folder was delivered meanwhile; of this one the sink has all messages \
             below offset {to}, and goes on there"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Range<Offset> = Offset(10)..Offset(99);
    const NOW: Option<FirstStart> = Some(FirstStart::Now(BeginNow::At(Offset(42))));

    fn name(pipeline: &str, sink: &str) -> Name {
        (pipeline.to_owned(), sink.to_owned())
    }

    fn claim() -> Claim {
        let identity = Identity { log: uuid::Uuid::nil(), generation: 1, partitions: 1 };
        claim_of(&["p".to_owned()], &["w".to_owned()], identity)
    }

    fn decide(
        begin: Option<FirstStart>,
        has_rows: bool,
        others: &[Name],
        delivered: Delivered,
    ) -> Result<u64, String> {
        beginning(begin).start(&claim(), 0, &found(has_rows, others), delivered, &KEPT).map(|offset| offset.0)
    }

    fn beginning(begin: Option<FirstStart>) -> Beginning {
        let configured = Arc::new([name("p", "w"), name("q", "w")].into());
        Beginning { begin, configured, stream: None }
    }

    fn found(has_rows: bool, others: &[Name]) -> Found {
        Found { has_rows, others: others.to_vec(), other_logs: Vec::new() }
    }

    #[test]
    fn a_stream_is_written_from_its_first_start_on_and_where_it_was_once_it_is_gone_unless_a_name_is() {
        let decide = |now: BeginNow, others: &[Name], delivered| {
            let begin = Some(FirstStart::Now(now));
            let beginning = Beginning { stream: Some(Offset(31)), ..beginning(begin) };
            beginning.start(&claim(), 0, &found(true, others), delivered, &KEPT).map(|offset| offset.0)
        };
        for delivered in [Delivered::ToNobody, Delivered::ToOthers, Delivered::ToThis] {
            for others in [vec![], vec![name("q", "w")], vec![name("q", "before")]] {
                assert_eq!(decide(BeginNow::At(Offset(42)), &others, delivered), Ok(42));
                assert_eq!(decide(BeginNow::At(Offset(3)), &others, delivered), Ok(10), "what is kept");
                assert_eq!(decide(BeginNow::Followed, &others, delivered), Ok(31));
            }
            for now in [BeginNow::At(Offset(42)), BeginNow::Followed] {
                let reason = decide(now, &[name("old", "w")], delivered).unwrap_err();
                assert!(reason.contains("set `renamed_from: old` in pipelines.p to go on"), "{reason}");
                assert!(reason.contains("stream of another name") && !reason.contains("begin:"), "{reason}");
            }
        }
    }

    #[test]
    fn a_first_start_needs_no_key_whatever_its_table_has() {
        for has_rows in [false, true] {
            assert_eq!(decide(None, has_rows, &[], Delivered::ToNobody), Ok(10));
            // Another pipeline of this host fills the same table.
            for delivered in [Delivered::ToNobody, Delivered::ToOthers] {
                assert_eq!(decide(None, has_rows, &[name("q", "w")], delivered), Ok(10));
            }
        }
        // A new table is filled, whoever was delivered to before.
        assert_eq!(decide(None, false, &[name("old", "w")], Delivered::ToThis), Ok(10));
    }

    #[test]
    fn a_table_that_the_stream_filled_under_another_name_is_asked_about() {
        for (other, wanted) in [
            (name("p", "old"), "set `renamed_from: old` in sinks.w to go on"),
            (name("old", "w"), "set `renamed_from: old` in pipelines.p to go on"),
            (
                name("a", "b"),
                "set `renamed_from: b` in sinks.w and `renamed_from: a` in pipelines.p to go on",
            ),
        ] {
            let reason =
                decide(None, true, &[name("q", "w"), other.clone()], Delivered::ToOthers).unwrap_err();
            assert!(reason.contains(wanted), "{reason}");
            assert!(reason.contains("`begin: start`") && reason.contains("`begin: now`"), "{reason}");
            assert_eq!(
                decide(Some(FirstStart::Start), true, std::slice::from_ref(&other), Delivered::ToOthers),
                Ok(10)
            );
            assert_eq!(decide(NOW, true, &[other], Delivered::ToOthers), Ok(42));
        }
    }

    #[test]
    fn a_table_whose_positions_are_gone_is_asked_about() {
        for (others, delivered) in [
            (vec![], Delivered::ToThis),
            (vec![name("q", "w")], Delivered::ToThis),
            (vec![], Delivered::ToOthers),
        ] {
            let reason = decide(None, true, &others, delivered).unwrap_err();
            assert!(reason.contains("are not in headworks_positions"), "{reason}");
            assert_eq!(decide(NOW, true, &others, delivered), Ok(42));
        }
    }

    #[test]
    fn a_table_that_another_log_filled_under_this_name_is_told_of_unless_a_person_has_decided() {
        let other = uuid::Uuid::from_u128(7);
        let claimed_at = Some("2026-11-29 08:00:00+00".to_owned());
        let found = Found { other_logs: vec![OtherLog { log: other, claimed_at }], ..Found::default() };
        let told = other_log(&claim(), &found, None).expect("a person has to know");
        assert_eq!(told.part, "sink p/w");
        for wanted in [&*other.to_string(), &*claim().log.to_string(), "claimed 2026-11-29 08:00:00+00"] {
            assert!(told.cause.contains(wanted), "{}", told.cause);
        }
        assert!(told.advice.contains("begin: start"), "{}", told.advice);
        for begin in [Some(FirstStart::Start), NOW] {
            assert_eq!(other_log(&claim(), &found, begin), None);
        }
        assert_eq!(other_log(&claim(), &Found::default(), None), None);
    }

    #[test]
    fn a_sink_that_is_ahead_of_this_copy_of_the_folder_is_a_problem_and_one_behind_is_none() {
        let step = |from, to| Advance {
            partition: crate::batch::Partition(0),
            from: Offset(from),
            to: Offset(to),
            lineage: None,
            letters: None,
        };
        let stream = crate::stream::memory::MemoryStream::new("s", 1);
        let failures = Failures::default();
        say_moved(&claim(), &*stream, &[step(5, 9)], &failures);
        assert_eq!(failures.standing(), []);
        say_moved(&claim(), &*stream, &[step(60, 50)], &failures);
        let told = failures.standing().remove(0);
        assert_eq!((&*told.part, told.kind), ("sink p/w", OTHER_LOG));
        assert!(told.cause.contains("offsets 50 to 59 of stream \"s\""), "{}", told.cause);
    }

    #[test]
    fn begin_now_is_an_offset_until_the_sink_has_begun_and_a_question_from_then_on() {
        for has_rows in [false, true] {
            for delivered in [Delivered::ToNobody, Delivered::ToOthers, Delivered::ToThis] {
                assert_eq!(decide(NOW, has_rows, &[], delivered), Ok(42), "whatever came since");
                let followed = Some(FirstStart::Now(BeginNow::Followed));
                let reason = decide(followed, has_rows, &[], delivered).unwrap_err();
                assert!(reason.contains("are not in headworks_positions"), "{reason}");
                assert!(
                    reason.contains("`begin: start` in sinks.w") && reason.contains("10 to 98"),
                    "{reason}"
                );
            }
        }
    }

    #[test]
    fn what_is_gone_before_a_sink_was_ever_open_is_lost_to_it_and_the_disk_lost_it_where_retention_waits() {
        let gone = Arc::new(Gone::new("p"));
        let lost =
            |on_lag, start| Waiting { from: Offset(3), on_lag, gone: Arc::clone(&gone) }.lost(Offset(start));
        assert_eq!(lost(OnLag::Detach, 9), Some((Offset(3)..Offset(9), GapCause::Trimmed)));
        assert_eq!(lost(OnLag::Block, 9), Some((Offset(3)..Offset(9), GapCause::Damaged)));
        for start in [0, 3] {
            assert_eq!((lost(OnLag::Detach, start), lost(OnLag::Block, start)), (None, None));
        }
    }

    #[test]
    fn a_claim_had_every_name_that_its_parts_had() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let identity = Identity { log: uuid::Uuid::nil(), generation: 1, partitions: 1 };
        let claim = claim_of(&names(&["p", "old"]), &names(&["w", "before"]), identity);
        assert_eq!((claim.pipeline.as_str(), claim.sink.as_str()), ("p", "w"));
        assert_eq!(claim.formerly, [name("old", "w"), name("p", "before"), name("old", "before")]);
        let claim = claim_of(&names(&["p"]), &names(&["w"]), identity);
        assert_eq!(claim.formerly, []);
    }
}
