//! The picture of a pool: pages in use over time, beside a padded batch of the same sequences.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::arrivals::{PAGE, Sample};
use crate::draw::{FONT, INK, PALE, grouped};

const SIZE: (u32, u32) = (1200, 460);
/// Points of a line at most.
const POINTS: usize = 600;

/// Draws the pages over time into the file `out`.
pub(crate) fn chart(out: &Path, subtitle: &str, samples: &[Sample]) -> anyhow::Result<()> {
    let root = SVGBackend::new(out, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let text =
        |size: u32| (FONT, size).into_font().color(&INK).pos(Pos::new(HPos::Left, VPos::Top));
    root.draw_text("Pages in use while requests come and go", &text(25), (24, 16))?;
    root.draw_text(subtitle, &text(15), (24, 52))?;
    let (_, body) = root.split_vertically(80);
    let every = samples.len().div_ceil(POINTS).max(1);
    // The peak of each piece, so that no peak is left out.
    let line = |of: fn(&Sample) -> usize| -> Vec<(f64, f64)> {
        let pieces = samples.chunks(every).enumerate();
        pieces
            .map(|(at, piece)| {
                let peak = piece.iter().map(of).max().unwrap_or(0);
                (count(at * every), count(peak))
            })
            .collect()
    };
    let lines = [
        ("a batch padded to its longest sequence", RGBColor(204, 102, 0), line(|it| it.padded)),
        ("live tokens, as pages", RGBColor(120, 120, 120), line(|it| it.tokens.div_ceil(PAGE))),
    ];
    let highest = lines[0].2.iter().map(|point| point.1).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&body)
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..count(samples.len()), 0.0..highest * 1.25)?;
    chart
        .configure_mesh()
        .x_desc("steps")
        .y_desc("pages of 16 tokens")
        .x_label_formatter(&|steps| grouped(*steps))
        .y_label_formatter(&|pages| grouped(*pages))
        .label_style((FONT, 15).into_font().color(&INK))
        .axis_desc_style((FONT, 16).into_font().color(&INK))
        .axis_style(INK)
        .bold_line_style(PALE)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (name, colour, points) in lines {
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 28, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 15).into_font().color(&INK))
        .background_style(WHITE)
        .border_style(PALE)
        .legend_area_size(34)
        .margin(10)
        .draw()?;
    root.present()?;
    Ok(())
}

/// Counts of steps and pages are small enough for an exact f64.
fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::MAX, f64::from)
}
