//! Which steps the message of a dead letter has been through, and where a redrive enters the
//! steps of now.
//!
//! A letter notes the names of the steps in the order of its time: those that its message has been
//! through, and those that were ahead of it. A redrive enters in front of the first step that the
//! message has not been through. So no step that was added or moved is left out, and no step is met
//! a second time, which might convert what it converted before. Where one of the two would happen
//! all the same, a person has to say where to enter ([`StepHistory::entry`]). What the person says
//! is only for letters of which that is true.

use std::fmt;
use std::sync::Arc;

use super::ROUTES_STEP;

/// How a person says where letters enter the steps.
const FROM_STEP: &str = "--from-step";
/// A dead letter does not note steps whose names take more bytes.
pub const NOTE_BYTES_MAX: usize = 4_096;

/// The steps of a message when it was rejected, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepHistory {
    passed: Vec<Arc<str>>,
    /// The first one is to run next.
    ahead: Vec<Arc<str>>,
}

impl StepHistory {
    /// The history of a message that has been through the steps before `place`.
    pub fn at(steps: &[Arc<str>], place: usize) -> Self {
        let (passed, ahead) = steps.split_at(place);
        Self { passed: passed.to_vec(), ahead: ahead.to_vec() }
    }

    /// Reads what [`fmt::Display`] wrote.
    pub fn read(text: &str) -> Option<Self> {
        let (passed, ahead) = text.split_once(';')?;
        let names = |text: &str| text.split(',').filter(|name| !name.is_empty()).map(Arc::from).collect();
        Some(Self { passed: names(passed), ahead: names(ahead) })
    }

    /// Returns the history of a message that entered `steps` at `entry` and has been through those
    /// before `place`. The message is to run all steps from `entry` on, also those that it had been
    /// through before: a step behind `place` counts as not passed.
    pub fn through(&self, steps: &[Arc<str>], entry: usize, place: usize) -> Self {
        let runs_again = |step: &&Arc<str>| steps[entry..].contains(step);
        let mut passed: Vec<_> = self.passed.iter().filter(|step| !runs_again(step)).cloned().collect();
        passed.extend_from_slice(&steps[entry..place]);
        Self { passed, ahead: steps[place..].to_vec() }
    }

    /// Returns the names of the steps that the message has been through.
    pub fn passed(&self) -> &[Arc<str>] {
        &self.passed
    }

    /// Returns the names of the steps that were ahead of the message.
    pub fn ahead(&self) -> &[Arc<str>] {
        &self.ahead
    }

    /// Returns the place in `steps` where the message enters, or why a person has to say it.
    pub fn entry(&self, steps: &[Arc<str>]) -> Result<usize, String> {
        let has_passed = |step: &&Arc<str>| self.passed.contains(step);
        let entry = steps.iter().take_while(has_passed).count();
        let ahead = &steps[entry..];
        if let Some(again) = ahead.iter().find(has_passed) {
            return Err(format!(
                "the message has been through step \"{again}\", and not through step \"{}\", which comes before it \
                 now: {}",
                ahead[0],
                say_where(steps)
            ));
        }
        let is_new = |step: &&Arc<str>| !self.ahead.contains(step);
        let gone = self.passed.iter().find(|step| !steps.contains(step));
        if let (Some(gone), Some(new)) = (gone, ahead.iter().find(is_new)) {
            return Err(format!(
                "the message has been through step \"{gone}\", which the pipeline does not have any more, and step \
                 \"{new}\", which is new, may be the same one: {}",
                say_where(steps)
            ));
        }
        Ok(entry)
    }
}

/// Returns where the message of a letter that has no history enters. Which steps were before the
/// one that rejected the message is not known.
pub fn entry_without_history(step: &str, steps: &[Arc<str>]) -> Result<usize, String> {
    match place_of(step, steps) {
        Some(0) => Ok(0),
        Some(_) => Err(format!(
            "the dead letter does not note the steps that its message has been through, since {}: {}",
            why_without_history(),
            say_where(steps)
        )),
        None => Err(format!(
            "step \"{step}\" is not among the pipeline's steps any more, and the dead letter does not note the \
             steps that came after it, since {}: {}",
            why_without_history(),
            say_where(steps)
        )),
    }
}

fn why_without_history() -> String {
    format!("an earlier version wrote it, or the names of the steps take more than {NOTE_BYTES_MAX} bytes")
}

/// Returns the place of a step that a person named.
pub fn entry_at(step: &str, steps: &[Arc<str>]) -> Result<usize, String> {
    place_of(step, steps).ok_or_else(|| {
        format!(
            "step \"{step}\", where the dead letter was to enter, is not there any more: {}",
            say_where(steps)
        )
    })
}

/// Returns why the message of a letter does not enter where the routes are: a step of that name
/// rejected it.
pub fn routes_was_a_step(steps: &[Arc<str>]) -> String {
    format!(
        "a step named {ROUTES_STEP} rejected the message, and the name stands for the place behind all steps now: {}",
        say_where(steps)
    )
}

/// Returns the place of a step, or the one behind all steps for that of the routes.
pub fn place_of(step: &str, steps: &[Arc<str>]) -> Option<usize> {
    let place = steps.iter().position(|own| **own == *step);
    place.or_else(|| (step == ROUTES_STEP).then_some(steps.len()))
}

/// `a, b, routes`
pub fn known(steps: &[Arc<str>]) -> String {
    steps.iter().map(|step| &**step).chain([ROUTES_STEP]).collect::<Vec<_>>().join(", ")
}

fn say_where(steps: &[Arc<str>]) -> String {
    format!("say with {FROM_STEP} which step it enters at, one of {}", known(steps))
}

/// `a,b;c`: what it has been through, and what was ahead. Names of steps have no commas.
impl fmt::Display for StepHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};{}", self.passed.join(","), self.ahead.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<Arc<str>> {
        text.split(' ').filter(|name| !name.is_empty()).map(Arc::from).collect()
    }

    fn history(passed: &str, ahead: &str) -> StepHistory {
        StepHistory { passed: names(passed), ahead: names(ahead) }
    }

    /// By what the steps were, those of now, and the place where the message enters.
    #[test]
    fn a_message_misses_no_step_that_was_added_and_meets_none_twice() {
        for (passed, ahead, now, entry) in [
            ("a", "check b", "a check b", Some(1)),
            ("a", "check b", "a b", Some(1)),
            ("", "check b", "b", Some(0)),
            ("a", "check", "a", Some(1)),
            ("a", "check", "", Some(0)),
            // One in its place, under a new name or another one.
            ("a", "check b", "a other b", Some(1)),
            ("a b", "check", "a b redact check", Some(2)),
            ("a b", "check", "b a check", Some(2)),
            ("a", "check b", "a b check", Some(1)),
            ("a b", "check", "b check", Some(1)),
            ("a b", "check", "a check", Some(1)),
            // Behind all steps.
            ("a b", "", "a b", Some(2)),
            ("a b", "", "a b redact", Some(2)),
            // It would meet `a` again, or never meet the step before it.
            ("a", "check", "redact a check", None),
            ("a", "check", "check a", None),
            ("a b", "check", "a redact b check", None),
            ("a b", "", "redact a b", None),
            // Is it the one that it has been through?
            ("a", "check", "renamed check", None),
            ("a", "check b", "b new", None),
        ] {
            let found = history(passed, ahead).entry(&names(now));
            assert_eq!(found.as_ref().ok(), entry.as_ref(), "{passed}; {ahead}: {now}: {found:?}");
            let is_told = found.err().is_none_or(|why| why.contains(FROM_STEP) && why.ends_with(", routes"));
            assert!(is_told);
        }
    }

    #[test]
    fn a_letter_without_history_enters_only_where_no_step_can_be_left_out() {
        for (step, now, entry) in [
            ("check", "check b", Some(0)),
            ("check", "a check", None),
            ("check", "a", None),
            (ROUTES_STEP, "", Some(0)),
            (ROUTES_STEP, "a", None),
        ] {
            assert_eq!(entry_without_history(step, &names(now)).ok(), entry, "{step}: {now}");
        }
    }

    #[test]
    fn a_history_reads_as_it_was_written_and_goes_on() {
        for history in [history("a b", "check"), history("", ""), history("", "check"), history("a", "")] {
            assert_eq!(StepHistory::read(&history.to_string()), Some(history));
        }
        assert_eq!(StepHistory::read("a,b"), None);
        let steps = names("a check b");
        assert_eq!(StepHistory::at(&steps, 1), history("a", "check b"));
        assert_eq!(history("a", "check").through(&steps, 1, 2), history("a check", "b"));
        assert_eq!(history("gone a", "check").through(&steps, 1, 1), history("gone a", "check b"));
        let entered_earlier = history("gone a check", "b").through(&steps, 0, 1);
        assert_eq!(entered_earlier, history("gone a", "check b"));
    }
}
