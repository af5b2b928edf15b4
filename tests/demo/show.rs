//! Plain, aligned output that fits 80 columns.

/// A heading and a rule below it.
pub fn title(text: &str) {
    println!("\n{text}\n{}", "-".repeat(text.chars().count()));
}

/// Name and value, aligned.
pub fn table(rows: &[[&str; 2]]) {
    let width = rows.iter().map(|row| row[0].len()).max().unwrap_or(0);
    for [name, value] in rows {
        println!("  {name:width$}  {value}");
    }
}

/// 1234567 as 1,234,567.
pub fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// At most `max` characters.
pub fn cut(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars().take(max - 1).collect::<String>() + "…"
}
