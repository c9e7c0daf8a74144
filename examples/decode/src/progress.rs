//! What a run of several prompts shows: a line for each sequence on a terminal, else each text when it ends.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use decode_engine::{Event, TextStream, Tokenizer};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use wgpu_kvcache::Stats;

/// Characters of a text that its line shows, from the end.
const TAIL: usize = 72;

/// The texts of all prompts as they come.
pub(crate) struct Progress<'a> {
    tokenizer: &'a Tokenizer,
    sequences: Vec<Sequence<'a>>,
    /// Whether to print texts.
    prints: bool,
    terminal: Option<Terminal>,
}

/// The lines of a terminal: those of the sequences that are being served, and at last the pages in use.
struct Terminal {
    lines: MultiProgress,
    pages: ProgressBar,
}

#[derive(Default)]
struct Sequence<'a> {
    stream: Option<TextStream<'a>>,
    text: String,
    line: Option<ProgressBar>,
}

impl<'a> Progress<'a> {
    /// For so many prompts. Shows nothing if `prints` is false.
    pub(crate) fn new(tokenizer: &'a Tokenizer, prompts: usize, prints: bool) -> Self {
        let terminal = (prints && io::stdout().is_terminal()).then(|| {
            let lines = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
            let pages = lines.add(line());
            Terminal { lines, pages }
        });
        let sequences = (0..prompts).map(|_| Sequence::default()).collect();
        Self { tokenizer, sequences, prints, terminal }
    }

    /// Follows one event of the run.
    pub(crate) fn follow(&mut self, event: Event, stats: &Stats) -> Result<()> {
        if !self.prints {
            return Ok(());
        }
        match event {
            Event::Joined(prompt) => {
                let sequence = &mut self.sequences[prompt];
                sequence.stream = Some(self.tokenizer.stream());
                sequence.line = self
                    .terminal
                    .as_ref()
                    .map(|Terminal { lines, pages }| lines.insert_before(pages, line()));
                sequence.show(prompt);
            }
            Event::Token(prompt, token) => {
                let sequence = &mut self.sequences[prompt];
                if let Some(stream) = &mut sequence.stream {
                    sequence.text += &stream.push(token)?;
                }
                sequence.show(prompt);
            }
            Event::Ended(prompt) => {
                let Sequence { stream, mut text, line } =
                    std::mem::take(&mut self.sequences[prompt]);
                text += &stream.map(TextStream::finish).transpose()?.unwrap_or_default();
                let print = || writeln!(io::stdout(), "{}: {text}", prompt + 1);
                match (&self.terminal, line) {
                    (Some(Terminal { lines, .. }), Some(line)) => {
                        line.finish_and_clear();
                        lines.remove(&line);
                        lines.suspend(print)?;
                    }
                    _ => print()?,
                }
            }
        }
        if let Some(Terminal { pages, .. }) = &self.terminal {
            let (used, shared) = (stats.pages_used, stats.pages_shared);
            pages.set_message(format!("pages    {used} in use, {shared} of them shared"));
        }
        Ok(())
    }

    /// Takes the lines off the terminal.
    pub(crate) fn finish(self) {
        if let Some(Terminal { pages, .. }) = self.terminal {
            pages.finish_and_clear();
        }
    }
}

impl Sequence<'_> {
    /// Shows the end of the text in the sequence's line.
    fn show(&self, prompt: usize) {
        let Some(line) = &self.line else { return };
        let skipped = self.text.chars().count().saturating_sub(TAIL);
        // Control characters would move the cursor.
        let tail: String = self.text.chars().skip(skipped).collect();
        line.set_message(format!("{}: {}", prompt + 1, tail.replace(char::is_control, " ")));
    }
}

/// A line of text, cut off at the width of the terminal.
fn line() -> ProgressBar {
    let style = ProgressStyle::with_template("{wide_msg}").expect("a template without an error");
    ProgressBar::new_spinner().with_style(style)
}
