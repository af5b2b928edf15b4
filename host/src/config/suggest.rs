//! Suggestions for misspelled words: "Did you mean ...?"

/// Returns the candidate that is close enough to `word` to be a typing error, if there is one: at most a
/// third of its letters differ.
pub fn closest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let same_letters = |a: &str, b: &str| {
        let plain = |text: &str| text.to_ascii_lowercase().replace(['-', '_'], "");
        plain(a) == plain(b)
    };
    candidates
        .into_iter()
        .map(|candidate| {
            let distance = if same_letters(word, candidate) { 0 } else { distance(word, candidate) };
            (distance, candidate)
        })
        .filter(|(distance, candidate)| *distance <= candidate.len().max(word.len()).div_ceil(3).min(4))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Returns the optimal string alignment distance: inserted, deleted, replaced and swapped letters.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            rows[i][j] = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                rows[i][j] = rows[i][j].min(rows[i - 2][j - 2] + 1);
            }
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_a_stranger_is_not() {
        let keys = ["rows_max", "bytes_max", "delay_max", "table"];
        assert_eq!(closest("row_max", keys), Some("rows_max"));
        assert_eq!(closest("rowsMax", keys), Some("rows_max"));
        assert_eq!(closest("tabel", keys), Some("table"));
        assert_eq!(closest("colour", keys), None);
    }
}
