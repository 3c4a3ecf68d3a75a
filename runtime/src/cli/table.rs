//! Tables: drawn for people on a terminal, and elsewhere a row a line with tabs between the cells, whole and without
//! borders, for grep, cut and awk.

use std::fmt;
use std::io::IsTerminal;

use comfy_table::{ContentArrangement, presets};

use super::text::one_line;

/// What a terminal usually has.
const WIDTH: u16 = 100;

pub(super) enum Table {
    Drawn(comfy_table::Table),
    Plain(String),
}

/// A table for standard output.
pub(super) fn table(header: &[&str]) -> Table {
    Table::new(header, std::io::stdout().is_terminal())
}

impl Table {
    fn new(header: &[&str], terminal: bool) -> Table {
        if !terminal {
            return Table::Plain(line(header));
        }
        let mut table = comfy_table::Table::new();
        table.load_preset(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(WIDTH).set_header(header.iter().map(|name| one_line(name)));
        Table::Drawn(table)
    }

    pub(super) fn add_row<T: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = T>) {
        match self {
            Table::Drawn(table) => {
                table.add_row(cells.into_iter().map(|cell| one_line(cell.as_ref()).into_owned()));
            }
            Table::Plain(text) => {
                text.push('\n');
                text.push_str(&line(cells));
            }
        }
    }
}

/// Cells have no tabs and no line ends of their own: these are shown.
pub(super) fn line<T: AsRef<str>>(cells: impl IntoIterator<Item = T>) -> String {
    let cells: Vec<_> = cells.into_iter().map(|cell| one_line(cell.as_ref()).into_owned()).collect();
    cells.join("\t")
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Table::Drawn(table) => table.fmt(f),
            Table::Plain(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_cells_are_wrapped_on_a_terminal_alone() {
        let cells = ["x".repeat(150), "a\tb\u{1b}".to_owned()];
        let shown = |terminal| {
            let mut table = Table::new(&["name", "n"], terminal);
            table.add_row(&cells);
            table.to_string()
        };
        assert_eq!(shown(false), format!("name\tn\n{}\ta\\tb\\u{{1b}}", cells[0]));
        let drawn = shown(true);
        assert!(drawn.lines().all(|line| line.chars().count() <= usize::from(WIDTH)), "{drawn}");
        assert!(!drawn.contains(['\t', '\u{1b}']), "{drawn}");
    }
}
