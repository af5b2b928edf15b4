//! What lies in the plugins folder: which files are new and whole, and what they are.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::build::Pipeline;
use super::{Known, Loaded, Untold, Work};
use crate::files::{NO_DESCRIPTOR_ADVICE, lacks_descriptor};
use crate::hints::Hint;
use crate::plugin::Error;
use crate::plugin::compile::CompileError;
use crate::plugin::config_file::ConfigFile;
use crate::plugin::folder::{self, Found, Listing, RefusedFile, file_name};
use crate::telemetry::Standing;

/// After so many times `plugins.poll`: a failure that may pass without a change of the file.
const RETRY_AFTER_POLLS: u32 = 10;
/// Kind of the failure, and the part and kind of the problem, of a folder that cannot be read.
const UNREADABLE: &str = "cannot read the plugins folder";
const FOLDER_PART: &str = "plugins folder";
const FOLDER_PROBLEM: &str = "plugin_failed";

impl Work {
    /// Looks at the folder and loads what is new and whole.
    pub(super) fn look(&mut self, renamed: &HashSet<PathBuf>) {
        let looking = self.failures.look_at(&self.config.dir);
        let listed = folder::list(&self.config.dir);
        drop(looking);
        let Listing { found, refused, .. } = match listed {
            // A folder that is gone has not become empty: it was moved, or is being replaced.
            Ok(listing) if !listing.is_there && (self.unreadable.is_some() || !self.files.is_empty()) => {
                return self.note_unreadable(&io::ErrorKind::NotFound.into());
            }
            Ok(listing) => listing,
            Err(error) => return self.note_unreadable(&error),
        };
        self.note_readable();
        let is_first = !self.has_looked;
        self.has_looked = true;
        // What comes in the place of a missed file is missed until it runs.
        let from_the_start = is_first || !self.missed.is_empty();
        self.note_refused(refused, is_first);
        self.settling.retain(&found);
        self.note_missing(&found);
        for found in found.values() {
            let known = self.files.entry(found.name.clone()).or_default();
            known.from_the_start |= from_the_start;
            known.missing = false;
            if found.note.is_some() && known.note != found.note {
                tracing::warn!(
                    file = file_name(&found.path),
                    "{}",
                    found.note.as_deref().unwrap_or_default()
                );
            }
            (known.path, known.order, known.note) = (found.path.clone(), found.order, found.note.clone());
            known.config.clone_from(&found.config);
        }
        let mut due: Vec<_> =
            found.into_values().filter(|found| self.is_due(found, renamed, is_first)).collect();
        // What needs no compiler first: nothing that is known waits for what takes long.
        due.sort_by_cached_key(|found| {
            !folder::read(&self.config.dir, found).is_ok_and(|files| self.library.knows(&files.wasm))
        });
        for found in due {
            if self.shared.is_stopped() {
                return;
            }
            self.load(found);
            self.publish(Pipeline::is_first);
        }
    }

    fn note_unreadable(&mut self, error: &io::Error) {
        let dir = self.config.dir.display();
        let detail = format!("{dir}: {error}");
        let what_to_do = match error.kind() {
            io::ErrorKind::NotFound => {
                format!("put {dir} back, or make an empty one where no plugin is to run")
            }
            io::ErrorKind::PermissionDenied => format!("let the host's user read {dir}"),
            _ if lacks_descriptor(error) => NO_DESCRIPTOR_ADVICE.to_owned(),
            _ => format!("look at the disk of {dir} and at the kernel's log"),
        };
        self.failures.report(UNREADABLE, 1, &detail, &self.failures.hint(Hint::PluginList));
        let cause = format!("{UNREADABLE} {detail}");
        self.failures.stands(Standing {
            part: FOLDER_PART.to_owned(),
            kind: FOLDER_PROBLEM,
            cause: format!("{cause}; what runs goes on, and no change of a file is seen"),
            advice: format!("{what_to_do}; the host looks again by itself"),
        });
        self.unreadable = Some(cause);
    }

    fn note_readable(&mut self) {
        if self.unreadable.take().is_some() {
            self.failures.end(UNREADABLE);
            self.failures.mended(FOLDER_PART, FOLDER_PROBLEM);
            tracing::info!(dir = %self.config.dir.display(), "the plugins folder can be read again");
        }
    }

    fn is_due(&mut self, found: &Found, renamed: &HashSet<PathBuf>, is_first: bool) -> bool {
        let known = &self.files[&found.name];
        if known.stamp.as_ref() == Some(&found.stamp) {
            self.settling.forget(found);
            return known.retry_at.is_some_and(|at| Instant::now() >= at);
        }
        let settle = self.config.settle.0;
        if is_first && found.stamp.is_older_than(settle) {
            return true;
        }
        self.settling.is_settled(found, known.stamp.as_ref(), settle, renamed)
    }

    fn note_refused(&mut self, refused: Vec<RefusedFile>, is_first: bool) {
        for RefusedFile { file, reason, .. } in refused.iter().filter(|it| !self.refused.contains(it)) {
            self.untold.push(Untold {
                file: file.clone(),
                kind: format!("plugin file {file} is not used"),
                detail: reason.clone(),
                show: self.failures.hint(Hint::PluginList),
            });
        }
        if is_first {
            self.missed = refused.iter().filter(|refused| refused.is_missed).cloned().collect();
        }
        self.missed.retain(|missed| refused.contains(missed));
        self.refused = refused;
    }

    fn note_missing(&mut self, found: &BTreeMap<String, Found>) {
        let dir = &self.config.dir;
        self.files.retain(|name, known| {
            if found.contains_key(name) {
                return true;
            }
            if folder::take_removed_mark(dir, name) {
                tracing::info!(plugin = name, "plugin removed");
                return false;
            }
            // A file that never was a step anywhere goes without a word.
            known.missing = true;
            known.was_step || known.loaded.is_some()
        });
    }

    fn load(&mut self, found: Found) {
        // Of a file that is back; left there, it would let a later loss pass without a word.
        folder::take_removed_mark(&self.config.dir, &found.name);
        let is_awaited = !*self.shared.is_loaded.borrow();
        self.library.compiler.set_awaited(is_awaited);
        self.known(&found.name).is_loading = true;
        self.show();
        let result = self.read(&found);
        let failures = self.failures.clone();
        let retry_after = self.config.poll.0 * RETRY_AFTER_POLLS;
        let known = self.known(&found.name);
        known.is_loading = false;
        let (file, mut untold) = (file_name(&found.path), None);
        match result {
            Ok(Some(loaded)) => {
                let description = &loaded.program.description;
                tracing::info!(file, name = found.name, version = description.version, "plugin loaded");
                known.loaded = Some(loaded);
                (known.error, known.retry_at) = (None, None);
            }
            // It changes again: see the next look. Or the host ends.
            Ok(None) | Err(Error::Compile(CompileError::Stopped)) => return,
            Err(error) => {
                let kept = if known.loaded.is_some() { "; the last good version stays" } else { "" };
                let reason = error.to_string();
                known.is_config_wrong = matches!(error, Error::Config(_));
                let show = match known.is_config_wrong {
                    true => failures.hint(Hint::Validate),
                    false => failures.hint(Hint::PluginInspect(&found.path)),
                };
                let kind = format!("plugin file {file} is not used");
                let detail = format!("{reason}{kept}");
                known.error = Some(reason);
                known.retry_at = error.is_passing().then(|| Instant::now() + retry_after);
                untold = Some(Untold { file, kind, detail, show });
            }
        }
        known.stamp = Some(found.stamp);
        self.untold.extend(untold);
    }

    fn known(&mut self, name: &str) -> &mut Known {
        self.files.entry(name.to_owned()).or_default()
    }

    /// `None`: the files are others by now than those that were found.
    fn read(&mut self, found: &Found) -> Result<Option<Loaded>, Error> {
        let looking = self.failures.look_at(&found.path);
        let files = folder::read(&self.config.dir, found);
        drop(looking);
        let files = files?;
        if files.stamp != found.stamp {
            return Ok(None);
        }
        let config = found.config.as_deref().map(file_name).zip(files.config);
        let config = config.map(|(file, text)| ConfigFile::parse(&file, &text)).transpose();
        let config = config.map_err(Error::Config)?;
        let program = Arc::new(self.library.load(&files.wasm)?);
        if program.is_access() {
            return Err(Error::NoStep);
        }
        let file_kept = self.kept.keep(&program.sha256, files.wasm);
        Ok(Some(Loaded { program, file_kept, config }))
    }
}
