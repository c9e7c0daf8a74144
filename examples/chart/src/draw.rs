//! The picture: lines of decode steps on the left, bars of reorders on the right.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::measure::{MAPS, Measured};

const SIZE: (u32, u32) = (1200, 560);
pub(crate) const FONT: &str = "sans-serif";
pub(crate) const INK: RGBColor = RGBColor(34, 34, 34);
pub(crate) const PALE: RGBColor = RGBColor(222, 222, 222);
/// Width of a group of bars, and of the space at each of its sides.
const GROUP: u32 = 120;
const GAP: u32 = 9;
/// Marks of the kinds: lines can be told apart without colour, and the second shows on the first.
const MARKS: [&[(i32, i32)]; 4] = [
    &[(-7, -7), (7, -7), (7, 7), (-7, 7)],
    &[(-6, 0), (0, -6), (6, 0), (0, 6)],
    &[(-7, 6), (0, -7), (7, 6)],
    &[(-7, -6), (7, -6), (0, 7)],
];

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error + Send + Sync>>;

/// Draws the chart into the file `out`.
pub(crate) fn chart(
    out: &Path,
    subtitle: &str,
    lengths: &[u32],
    measured: &[Measured],
) -> anyhow::Result<()> {
    let root = SVGBackend::new(out, SIZE).into_drawing_area();
    // Without a ground of its own the picture would be unreadable on a dark page.
    root.fill(&WHITE)?;
    let text = |size: u32, place: HPos| {
        (FONT, size).into_font().color(&INK).pos(Pos::new(place, VPos::Top))
    };
    root.draw_text(
        "What a K/V cache costs: this crate, and a cache that concatenates",
        &text(25, HPos::Left),
        (24, 16),
    )?;
    root.draw_text(subtitle, &text(15, HPos::Left), (24, 52))?;
    let (_, body) = root.split_vertically(84);
    let (left, right) = body.split_horizontally(600);
    steps(&left, lengths, measured).map_err(anyhow::Error::from_boxed)?;
    reorders(&right, lengths, measured).map_err(anyhow::Error::from_boxed)?;
    root.present()?;
    Ok(())
}

/// Time against length, both logarithmic: a cost that grows with the length is a slope, one that does
/// not is level.
fn steps(panel: &Panel<'_>, lengths: &[u32], measured: &[Measured]) -> Drawn {
    let ticks: Vec<_> = lengths.iter().copied().map(f64::from).collect();
    let all = || measured.iter().flat_map(|measured| measured.steps.iter().copied());
    // The room above is for the legend.
    let [low, high] = [all().fold(f64::MAX, f64::min) / 2.0, all().fold(0.0, f64::max) * 8.0];
    let decades: Vec<_> = (-6..=6)
        .map(|power| 10_f64.powi(power))
        .filter(|time| (low..high).contains(time))
        .collect();
    let mut chart = ChartBuilder::on(panel)
        .caption("A decode step", (FONT, 19).into_font().color(&INK))
        .margin(16)
        .x_label_area_size(52)
        .y_label_area_size(72)
        .build_cartesian_2d(
            (ticks[0] / 1.2..ticks[ticks.len() - 1] * 1.2)
                .log_scale()
                .with_key_points(ticks.clone()),
            (low..high).log_scale().with_key_points(decades),
        )?;
    chart
        .configure_mesh()
        .x_desc("tokens in the cache")
        .y_desc("milliseconds a decode step")
        .x_label_formatter(&|tokens| grouped(*tokens))
        .y_label_formatter(&|&time| if time < 1.0 { time.to_string() } else { grouped(time) })
        .label_style((FONT, 15).into_font().color(&INK))
        .axis_desc_style((FONT, 16).into_font().color(&INK))
        .axis_style(INK)
        .bold_line_style(PALE)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (index, Measured { kind, steps, .. }) in measured.iter().enumerate() {
        let colour = rgb(kind.colour);
        // Where two lines lie on each other, the first shows at both sides of the second.
        let line = colour.stroke_width(if index == 0 { 5 } else { 2 });
        let points: Vec<_> = ticks.iter().copied().zip(steps.iter().copied()).collect();
        let last = steps.last().copied().unwrap_or_default();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), line))?
            .label(format!("{}: {last:.2} ms at {}", kind.name, grouped(ticks[ticks.len() - 1])))
            .legend(move |(x, y)| {
                EmptyElement::at((x + 14, y))
                    + PathElement::new([(-14, 0), (14, 0)], line)
                    + mark(index, colour)
            });
        chart.draw_series(points.iter().map(|&at| EmptyElement::at(at) + mark(index, colour)))?;
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
    Ok(())
}

/// Bytes of each map, a group of bars each. A group is [`GROUP`] wide.
fn reorders(panel: &Panel<'_>, lengths: &[u32], measured: &[Measured]) -> Drawn {
    let tokens = lengths.last().copied().map_or(0.0, f64::from);
    let starts: Vec<_> = (0..).step_by(GROUP as usize).take(MAPS.len()).collect();
    let middles: Vec<_> = starts.iter().map(|start| start + GROUP / 2).collect();
    let high =
        measured.iter().flat_map(|measured| measured.reorders.iter().copied()).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(panel)
        .caption(
            format!("A reorder of eight beams of {} tokens", grouped(tokens)),
            (FONT, 19).into_font().color(&INK),
        )
        .margin(16)
        .x_label_area_size(52)
        .y_label_area_size(72)
        .build_cartesian_2d(
            (0..GROUP * u32::try_from(MAPS.len())?).with_key_points(middles),
            0.0..high * 1.1,
        )?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("beams that change")
        .y_desc("MiB moved")
        .x_label_formatter(&|at| MAPS[(at / GROUP) as usize].name.to_owned())
        .y_label_formatter(&|moved| grouped(*moved))
        .label_style((FONT, 15).into_font().color(&INK))
        .axis_desc_style((FONT, 16).into_font().color(&INK))
        .axis_style(INK)
        .bold_line_style(PALE)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let wide = (GROUP - 2 * GAP) / u32::try_from(measured.len())?;
    for (left, Measured { kind, reorders, .. }) in (GAP..).step_by(wide as usize).zip(measured) {
        let colour = rgb(kind.colour);
        let label = (FONT, 14).into_font().color(&INK).pos(Pos::new(HPos::Center, VPos::Bottom));
        for (start, &moved) in starts.iter().zip(reorders) {
            let [from, to] = [start + left + 1, start + left + wide - 1];
            chart.draw_series([Rectangle::new([(from, 0.0), (to, moved)], colour.filled())])?;
            let at = ((from + to) / 2, moved + high * 0.015);
            chart.draw_series([Text::new(grouped(moved), at, label.clone())])?;
        }
    }
    Ok(())
}

/// A kind's own mark, around the origin.
fn mark(index: usize, colour: RGBColor) -> Polygon<(i32, i32)> {
    Polygon::new(MARKS[index % MARKS.len()], colour.filled())
}

fn rgb((red, green, blue): (u8, u8, u8)) -> RGBColor {
    RGBColor(red, green, blue)
}

/// A whole number with its thousands set apart.
pub(crate) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
