//! Files and lines of a plugin's code, for the texts of its traps.
//!
//! A compiler leaves them as DWARF in the file, if it was told to. The compiling
//! child reads that, since a file is an attack surface, and gives the host no
//! more than a table: for each place of the code from where on it is of which file
//! and line. The host finds a line by searching it, however odd the DWARF was, and
//! keeps no DWARF in memory. Programs of all languages that have line tables are
//! read (DWARF 5, 6.2; for wasm: "DWARF for WebAssembly", offsets begin with the
//! code section).

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use gimli::{Dwarf, EndianSlice, LineRow, LittleEndian, SectionId, Unit};
use wasmparser::{Parser, Payload};

use super::host::printable;

/// Most bytes of a table; a larger one is left out.
pub(super) const LINES_BYTES_MAX: usize = 4 << 20;
const ROWS_MAX: usize = LINES_BYTES_MAX / ROW_BYTES;
/// Rows of DWARF that are read: most tell what the row before told.
const ROWS_READ_MAX: usize = 8 << 20;
const FILE_CHARS_MAX: usize = 200;
/// File of a place that is of none.
const NO_FILE: u32 = u32::MAX;
const ROW_BYTES: usize = 12;

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// A table as the child made it: the count of rows, rows of (offset in the
/// component, place of the file's name in the table, line) by offset, and the names,
/// each with its length in front. All numbers are u32, little-endian.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Believes no more of it than that the bytes are there.
    pub fn read(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// File and line of the code at `offset` of the component.
    pub fn at(&self, offset: usize) -> Option<(&str, u32)> {
        let offset = u32::try_from(offset).ok()?;
        let rows = self.0.get(4..)?.get(..self.count()?.checked_mul(ROW_BYTES)?)?;
        let (rows, _) = rows.as_chunks::<ROW_BYTES>();
        let after = rows.partition_point(|row| number(row, 0) <= Some(offset));
        let row = rows.get(after.checked_sub(1)?)?;
        let (file, line) = (number(row, 4)?, number(row, 8)?);
        Some((self.name(file)?, line))
    }

    fn count(&self) -> Option<usize> {
        Some(number(&self.0, 0)? as usize)
    }

    /// The name that lies at `at` of the table.
    fn name(&self, at: u32) -> Option<&str> {
        let at = usize::try_from(at).ok()?;
        let name = self.0.get(at..)?.get(4..)?.get(..number(&self.0, at)? as usize)?;
        std::str::from_utf8(name).ok()
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// The table of a component, empty where it has no line information, or too much.
/// Damaged DWARF costs a plugin its lines and nothing else.
pub(super) fn of(component: &[u8]) -> Vec<u8> {
    // What runs here is the child; a panic would be told as the file's compiler's.
    catch_unwind(AssertUnwindSafe(|| table(component))).unwrap_or_default()
}

fn table(component: &[u8]) -> Vec<u8> {
    let mut made = Made::default();
    let mut modules: Vec<Module<'_>> = Vec::new();
    for payload in Parser::new(0).parse_all(component) {
        match payload {
            Ok(Payload::Version { .. }) => modules.push(Module::default()),
            Ok(Payload::CodeSectionStart { range, .. }) => {
                if let Some(module) = modules.last_mut() {
                    module.code = (range.start, range.end);
                }
            }
            Ok(Payload::CustomSection(section)) if section.name().starts_with(".debug_") => {
                if let Some(module) = modules.last_mut() {
                    module.sections.insert(section.name(), section.data());
                }
            }
            Ok(Payload::End(_)) => {
                let module = modules.pop().unwrap_or_default();
                if !module.sections.is_empty() {
                    // Up to a fault: what stands before it is right.
                    let _ = made.read(&module);
                }
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    made.finish()
}

#[derive(Default)]
struct Module<'a> {
    /// Begin and end of what the code section holds.
    code: (usize, usize),
    sections: HashMap<&'a str, &'a [u8]>,
}

#[derive(Default)]
struct Made {
    rows: Vec<(u32, u32, u32)>,
    files: HashMap<String, u32>,
    names: Vec<String>,
    read: usize,
    is_too_much: bool,
}

impl Made {
    fn read(&mut self, module: &Module<'_>) -> gimli::Result<()> {
        let section = |id: SectionId| -> gimli::Result<Slice<'_>> {
            let data = module.sections.get(id.name()).copied().unwrap_or_default();
            Ok(EndianSlice::new(data, LittleEndian))
        };
        let dwarf = Dwarf::load(section)?;
        let mut units = dwarf.units();
        let mut seen = HashSet::new();
        while let Some(header) = units.next()? {
            let unit = dwarf.unit(header)?;
            // Several units may name one program.
            let is_new = |unit: &Unit<Slice<'_>>| {
                unit.line_program.as_ref().map(|program| program.header().offset().0)
            };
            if is_new(&unit).is_some_and(|at| seen.insert(at)) {
                self.read_unit(&dwarf, &unit, module.code)?;
            }
        }
        Ok(())
    }

    fn read_unit(
        &mut self,
        dwarf: &Dwarf<Slice<'_>>,
        unit: &Unit<Slice<'_>>,
        (begin, end): (usize, usize),
    ) -> gimli::Result<()> {
        let Some(program) = unit.line_program.clone() else { return Ok(()) };
        let mut numbers: HashMap<u64, u32> = HashMap::new();
        let mut rows = program.rows();
        let mut last = None;
        while let Some((header, row)) = rows.next_row()? {
            self.read += 1;
            self.is_too_much |= self.read > ROWS_READ_MAX || self.rows.len() > ROWS_MAX;
            if self.is_too_much {
                return Ok(());
            }
            // Code that the linker took out lies at no address of the section.
            let offset = usize::try_from(row.address()).ok().and_then(|at| at.checked_add(begin));
            let Some(offset) = offset.filter(|offset| *offset <= end) else { continue };
            let (mut file, mut line) = (NO_FILE, 0);
            if !row.end_sequence()
                && let Some(known) = row.line()
            {
                line = u32::try_from(known.get()).unwrap_or(u32::MAX);
                file = match numbers.get(&row.file_index()) {
                    Some(number) => *number,
                    None => {
                        let number = self.file(&path(dwarf, unit, header, row));
                        numbers.insert(row.file_index(), number);
                        number
                    }
                };
            }
            let told = (file, line);
            if last != Some(told) {
                self.rows.push((offset as u32, file, line));
            }
            last = Some(told).filter(|_| !row.end_sequence());
        }
        Ok(())
    }

    fn file(&mut self, path: &str) -> u32 {
        let path: String = printable(path).chars().take(FILE_CHARS_MAX).collect();
        let next = self.names.len() as u32;
        *self.files.entry(path).or_insert_with_key(|path| {
            self.names.push(path.clone());
            next
        })
    }

    fn finish(mut self) -> Vec<u8> {
        // Where one sequence ends and the next begins, the begin counts.
        self.rows.sort_by_key(|(offset, file, _)| (*offset, *file != NO_FILE));
        self.rows.dedup_by(|next, last| {
            let is_same_place = next.0 == last.0;
            if is_same_place {
                *last = *next;
            }
            is_same_place || (next.1, next.2) == (last.1, last.2)
        });
        let names: usize = self.names.iter().map(|name| 4 + name.len()).sum();
        if self.names.is_empty()
            || self.is_too_much
            || 4 + self.rows.len() * ROW_BYTES + names > LINES_BYTES_MAX
        {
            return Vec::new();
        }
        let mut places = Vec::new();
        let mut next = 4 + self.rows.len() * ROW_BYTES;
        for name in &self.names {
            places.push(next as u32);
            next += 4 + name.len();
        }
        let mut bytes = (self.rows.len() as u32).to_le_bytes().to_vec();
        for (offset, file, line) in self.rows {
            let file = places.get(file as usize).copied().unwrap_or(NO_FILE);
            bytes.extend([offset, file, line].iter().flat_map(|number| number.to_le_bytes()));
        }
        for name in self.names {
            bytes.extend((name.len() as u32).to_le_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes
    }
}

/// As the author knows it: relative to the folder of the compiler's start where it lies
/// below that.
fn path(
    dwarf: &Dwarf<Slice<'_>>,
    unit: &Unit<Slice<'_>>,
    header: &gimli::LineProgramHeader<Slice<'_>>,
    row: &LineRow,
) -> String {
    let text = |value| {
        let found = dwarf.attr_string(unit, value).ok()?;
        Some(found.to_string_lossy().into_owned())
    };
    let Some(file) = row.file(header) else { return "?".to_owned() };
    let name = text(file.path_name()).unwrap_or_else(|| "?".to_owned());
    let folder = match file.directory_index() {
        0 => None,
        _ => file.directory(header).and_then(text),
    };
    match folder {
        Some(folder) if !name.starts_with('/') && !folder.is_empty() => format!("{folder}/{name}"),
        _ => name,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use gimli::write::{Address, DwarfUnit, EndianVec, LineProgram, LineString, Sections};
    use gimli::{Encoding, Format, LineEncoding};
    use proptest::prelude::*;
    use wasmparser::Operator;

    use super::super::load::Report;
    use super::super::test_plugins::batch_plugin;
    use super::*;

    /// A plugin that traps in the function `blow_up`, which `from_here` calls.
    pub fn trapping() -> Vec<u8> {
        let body = "(if (local.get $index_len) (then (call $from_here)))";
        let functions =
            "(func $from_here (call $blow_up)) (func $blow_up (global.set $heap (i32.const 0)) unreachable)";
        batch_plugin("1.0.0", &[], body, functions)
    }

    /// The same file with DWARF that says of what line its `unreachable` is: `file` in the folder
    /// `folder` of the program's own.
    pub fn with_line(module: &[u8], version: u16, folder: &str, file: &str, line: u64) -> Vec<u8> {
        let at = unreachable_at(module);
        with_lines(module, version, folder, file, [(at - 1, line - 1), (at, line)].into_iter())
    }

    /// With (place in the code section, line) for each row.
    fn with_lines(
        module: &[u8],
        version: u16,
        folder: &str,
        file: &str,
        rows: impl Iterator<Item = (u64, u64)>,
    ) -> Vec<u8> {
        let encoding = Encoding { format: Format::Dwarf32, version, address_size: 4 };
        let mut dwarf = DwarfUnit::new(encoding);
        let mut text = |text: &str| LineString::new(text, encoding, &mut dwarf.line_strings);
        let (home, file_name, folder) = (text("/home/ann/plugin"), text(file), text(folder));
        let line_encoding = LineEncoding::default();
        let mut program = LineProgram::new(encoding, line_encoding, home, None, file_name.clone(), None);
        let directory = program.add_directory(folder);
        let file = program.add_file(file_name, directory, None);
        program.begin_sequence(Some(Address::Constant(0)));
        let mut end = 0;
        for (at, line) in rows {
            let row = program.row();
            (row.address_offset, row.file, row.line) = (at, file, line);
            program.generate_row();
            // As compilers do: past the function's `end`.
            end = at + 2;
        }
        program.end_sequence(end);
        dwarf.unit.line_program = program;
        let mut sections = Sections::new(EndianVec::new(LittleEndian));
        dwarf.write(&mut sections).unwrap();
        let mut out = module.to_vec();
        let append = |id: SectionId, data: &EndianVec<LittleEndian>| -> Result<(), ()> {
            if !data.slice().is_empty() {
                custom_section(&mut out, id.name(), data.slice());
            }
            Ok(())
        };
        sections.for_each(append).unwrap();
        out
    }

    fn custom_section(out: &mut Vec<u8>, name: &str, data: &[u8]) {
        let leb = |mut number: usize| {
            let mut bytes = Vec::new();
            while number > 0x7f {
                bytes.push(number as u8 & 0x7f | 0x80);
                number >>= 7;
            }
            bytes.push(number as u8);
            bytes
        };
        let body = [&leb(name.len())[..], name.as_bytes(), data].concat();
        out.push(0);
        out.extend(leb(body.len()));
        out.extend(body);
    }

    /// Where the function that ends so traps, from the begin of the code section.
    fn unreachable_at(module: &[u8]) -> u64 {
        let (mut begin, mut found) = (0, 0);
        for payload in Parser::new(0).parse_all(module) {
            match payload.unwrap() {
                Payload::CodeSectionStart { range, .. } => begin = range.start,
                Payload::CodeSectionEntry(body) => {
                    let operators = body.get_operators_reader().unwrap().into_iter_with_offsets();
                    let operators: Vec<_> = operators.collect::<Result<_, _>>().unwrap();
                    if let [.., (Operator::Unreachable, at), (Operator::End, _)] = operators[..] {
                        found = at - begin;
                    }
                }
                _ => {}
            }
        }
        found as u64
    }

    fn lines_of(file: &[u8]) -> Lines {
        Lines::read(of(&Report::of(file).1))
    }

    /// All (file, line) of a table.
    fn all(lines: &Lines) -> Vec<(String, u32)> {
        let (rows, _) = lines.0[4..4 + lines.count().unwrap() * ROW_BYTES].as_chunks::<ROW_BYTES>();
        let at = |row: &[u8; ROW_BYTES]| lines.at(number(row, 0).unwrap() as usize);
        rows.iter().filter_map(at).map(|(file, line)| (file.to_owned(), line)).collect()
    }

    #[test]
    fn a_file_is_named_as_its_author_knows_it() {
        for version in [4, 5] {
            for (folder, expected) in [("src", "src/plugin.c"), ("/usr/include", "/usr/include/plugin.c")] {
                let file = with_line(&trapping(), version, folder, "plugin.c", 7);
                let expected = [6, 7].map(|line| (expected.to_owned(), line));
                assert_eq!(all(&lines_of(&file)), expected, "DWARF {version}");
            }
        }
        assert_eq!(lines_of(&trapping()).bytes(), b"", "none without debug information");
    }

    #[test]
    fn what_a_name_holds_cannot_drive_the_terminal() {
        let file = with_line(&trapping(), 5, "src", "\u{1b}[2Jx", 7);
        let lines = lines_of(&file);
        assert!(!lines.bytes().contains(&0x1b) && all(&lines)[0].0.ends_with("[2Jx"), "{lines:?}");
        let long = lines_of(&with_line(&trapping(), 5, "src", &"x".repeat(10_000), 7));
        assert_eq!(all(&long)[0].0.len(), FILE_CHARS_MAX);
    }

    #[test]
    fn a_table_that_is_too_large_is_left_out() {
        let at = unreachable_at(&trapping());
        let rows = |count: usize| (0..count as u64).map(move |n| (at, n + 1));
        let kept =
            |count| !lines_of(&with_lines(&trapping(), 5, "src", "a.c", rows(count))).bytes().is_empty();
        assert!(kept(1_000) && !kept(ROWS_MAX + 2));
    }

    #[test]
    fn damaged_debug_information_costs_the_lines_and_nothing_else() {
        let good = with_line(&trapping(), 5, "src", "plugin.c", 7);
        let whole = trapping().len();
        for at in whole..good.len() {
            for change in [0xff, 1, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= change;
                let (report, component) = Report::of(&bad);
                if report.kind.is_ok() {
                    Lines::read(of(&component)).at(at);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table_that_can_be_searched(bytes in prop::collection::vec(any::<u8>(), 0..200), at: usize) {
            Lines::read(bytes.clone()).at(at);
            // A count that fits.
            let mut fits = ((bytes.len() / ROW_BYTES) as u32).to_le_bytes().to_vec();
            fits.extend(bytes);
            Lines::read(fits.clone()).at(at % 300);
            Lines::read(fits).at(at);
        }
    }
}
