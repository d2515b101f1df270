//! What was measured, as rows of the table, and whether each bar is met.

use crate::rivals::Column;

/// One party's work in one round.
#[derive(Clone, Default)]
pub struct Sample {
    /// Seconds, as the client saw it; none where no time is measured
    pub time: Option<f64>,
    /// CPU seconds of the party for all of it
    pub cpu: f64,
    /// CPU seconds of the client for the same
    pub client_cpu: f64,
    /// Gigabytes, requests or connections: what CPU seconds are divided by
    pub amount: f64,
    /// How often the client did it; `time` is that of one
    pub times: usize,
    /// KiB
    pub peak: u64,
    /// Requests for archives that upstream saw
    pub fetches: usize,
    /// KiB that this row is about
    pub memory: Option<f64>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Unit {
    Gigabyte,
    Request,
}

/// What a row must reach.
#[derive(Clone, Copy)]
pub enum Bar {
    /// Time by that of another column
    TimeBy(Column, f64),
    /// Milliseconds more than another column
    Later(Column, f64),
    CpuBy(Column, f64),
    /// CPU microseconds a request
    CpuMicros(f64),
    /// The most fetches in a round
    Fetches(usize),
    PeakMiB(f64),
    /// KiB that the row is about
    MemoryKiB(f64),
}

/// KiB by which what is called flat may grow: an allocator's pages wander.
pub const FLAT: f64 = 1024.0;

#[derive(Clone)]
pub struct Row {
    name: String,
    unit: Unit,
    bars: Vec<Bar>,
    memory_label: &'static str,
    /// How many cores others had meanwhile
    pub busy: f64,
    samples: Vec<(Column, Vec<Sample>)>,
}

/// A row is said to be disturbed where others had so many cores.
const DISTURBED: f64 = 0.2;

/// Of a column.
const WIDTH: usize = 17;

pub fn head(columns: &[Column]) {
    let mut line = format!("{:<36}", "work");
    for column in columns {
        line += &format!("{:>WIDTH$}", column.name());
    }
    println!("{line}\n{}", "-".repeat(line.len()));
}

/// The rows as one table for a page, without the columns that do not take part.
pub fn markdown(columns: &[Column], rows: &[Row]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let names = columns.iter().map(|column| column.name().to_owned());
    let mut text = line(["work".to_owned()].into_iter().chain(names).collect());
    text += &line(vec!["---".to_owned(); columns.len() + 1]);
    for row in rows {
        let cell = |column: &Column| row.cell(*column).unwrap_or_else(|| "–".to_owned());
        let cells = [row.name.clone()]
            .into_iter()
            .chain(columns.iter().map(cell));
        text += &line(cells.collect());
    }
    text +=
        "\nEach cell: median time (fastest to slowest), CPU a gigabyte or a request, peak RSS.\n";
    text
}

impl Row {
    pub fn new(name: &str, unit: Unit, bars: &[Bar]) -> Self {
        Self {
            name: name.to_owned(),
            unit,
            bars: bars.to_vec(),
            memory_label: "",
            busy: 0.0,
            samples: Vec::new(),
        }
    }

    /// What the memory of its samples is: `KiB a connection`.
    pub fn about(mut self, label: &'static str) -> Self {
        self.memory_label = label;
        self
    }

    pub fn add(&mut self, column: Column, sample: Sample) {
        match self.samples.iter_mut().find(|(c, _)| *c == column) {
            Some((_, samples)) => samples.push(sample),
            None => self.samples.push((column, vec![sample])),
        }
    }

    pub fn forget(&mut self, column: Column) {
        self.samples.retain(|(c, _)| *c != column);
    }

    /// Prints the row; returns its verdicts, a line each.
    pub fn print(&self, columns: &[Column]) -> Vec<String> {
        println!("{}", self.name);
        let line = |label: &str, cell: &dyn Fn(Column) -> Option<String>| {
            let cells: Vec<_> = columns.iter().map(|column| cell(*column)).collect();
            if cells.iter().all(Option::is_none) {
                return;
            }
            let mut line = format!("  {label:<34}");
            for cell in cells {
                line += &format!("{:>WIDTH$}", cell.as_deref().unwrap_or("-"));
            }
            println!("{line}");
        };
        line("time", &|c| self.time(c).map(human));
        line("  fastest..slowest", &|c| self.spread(c));
        line("time / nginx", &|c| {
            self.ratio(c, Column::Nginx, Self::time)
        });
        line("time / bare upstream", &|c| {
            self.ratio(c, Column::Bare, Self::time)
        });
        let label = match self.unit {
            Unit::Gigabyte => "CPU s/GB",
            Unit::Request => "CPU us/request",
        };
        line(label, &|c| self.cpu(c).map(|cpu| self.cpu_text(cpu)));
        line("CPU / nginx", &|c| self.ratio(c, Column::Nginx, Self::cpu));
        line("the client's CPU", &|c| {
            self.client_cpu(c).map(|cpu| self.cpu_text(cpu))
        });
        let label = match self.unit {
            Unit::Gigabyte => "MB/s",
            Unit::Request => "requests/s",
        };
        line(label, &|c| self.rate(c).map(|rate| self.rate_text(rate)));
        line(self.memory_label, &|c| {
            self.memory(c).map(|m| format!("{m:.1}"))
        });
        line("peak RSS, MiB", &|c| {
            self.peak(c).map(|peak| format!("{peak:.1}"))
        });
        line("archive fetches", &|c| {
            self.fetches(c).map(|n| n.to_string())
        });
        let verdicts: Vec<_> = self.bars.iter().map(|bar| self.verdict(*bar)).collect();
        for verdict in &verdicts {
            println!("  {verdict}");
        }
        if self.busy >= DISTURBED {
            let busy = self.busy;
            println!("  disturbed: others had {busy:.1} cores of this machine meanwhile");
        }
        println!();
        let named = |verdict: String| format!("{:<52} {verdict}", self.name);
        verdicts.into_iter().map(named).collect()
    }

    /// All that is known of a column, in one.
    fn cell(&self, column: Column) -> Option<String> {
        let time = self.times(column).map(|times| {
            let (fastest, slowest) = (times[0], times[times.len() - 1]);
            let all = [times[times.len() / 2], fastest, slowest].map(human);
            match times.len() {
                1 => all[0].clone(),
                _ => format!("{} ({} to {})", all[0], all[1], all[2]),
            }
        });
        let cpu = self.cpu(column).map(|cpu| match self.unit {
            Unit::Gigabyte => format!("CPU {} s/GB", self.cpu_text(cpu)),
            Unit::Request => format!("CPU {} us", self.cpu_text(cpu)),
        });
        let about = self.memory_label;
        let memory = self.memory(column).map(|m| format!("{m:.1} {about}"));
        let peak = self.peak(column).map(|peak| format!("{peak:.0} MiB"));
        let parts: Vec<_> = [time, cpu, memory, peak].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }

    fn verdict(&self, bar: Bar) -> String {
        let ours = Column::Larder;
        let over = |other: Column, of: fn(&Self, Column) -> Option<f64>| {
            Some(of(self, ours)? / of(self, other)?)
        };
        let (text, value, limit) = match bar {
            Bar::TimeBy(other, limit) => {
                let text = format!("time <= {limit:.2} x {}", other.name());
                (text, over(other, Self::time), limit)
            }
            Bar::CpuBy(other, limit) => {
                let text = format!("CPU <= {limit:.2} x {}", other.name());
                (text, over(other, Self::cpu), limit)
            }
            Bar::Later(other, limit) => {
                let text = format!("<= {limit} ms after {}", other.name());
                let times = self.time(ours).zip(self.time(other));
                (text, times.map(|(a, b)| (a - b) * 1e3), limit)
            }
            Bar::CpuMicros(limit) => {
                let value = self.cpu(ours).map(|cpu| cpu * 1e6);
                (format!("<= {limit} CPU us"), value, limit)
            }
            Bar::Fetches(limit) => {
                let value = self.fetches(ours).map(|n| n as f64);
                (format!("fetches <= {limit}"), value, limit as f64)
            }
            Bar::PeakMiB(limit) => (format!("peak RSS <= {limit} MiB"), self.peak(ours), limit),
            Bar::MemoryKiB(limit) => (format!("<= {limit} KiB"), self.memory(ours), limit),
        };
        match value {
            None => format!("bar: {text:<28} not measured"),
            Some(value) => {
                let met = if value <= limit { "met" } else { "NOT MET" };
                format!("bar: {text:<28} {value:>8.2}  {met}")
            }
        }
    }

    fn samples(&self, column: Column) -> Option<&[Sample]> {
        let found = self.samples.iter().find(|(c, _)| *c == column)?;
        Some(&found.1)
    }

    fn times(&self, column: Column) -> Option<Vec<f64>> {
        let times = self.samples(column)?.iter().map(|sample| sample.time);
        sorted(times)
    }

    fn time(&self, column: Column) -> Option<f64> {
        let times = self.times(column)?;
        Some(times[times.len() / 2])
    }

    fn spread(&self, column: Column) -> Option<String> {
        let times = self.times(column)?;
        let (fastest, slowest) = (times[0], times[times.len() - 1]);
        Some(format!("{}..{}", human(fastest), human(slowest)))
    }

    fn ratio(
        &self,
        column: Column,
        to: Column,
        of: fn(&Self, Column) -> Option<f64>,
    ) -> Option<String> {
        let other = of(self, to)?;
        Some(format!("{:.2}", of(self, column)? / other))
    }

    /// Of all rounds together, a unit.
    fn cpu(&self, column: Column) -> Option<f64> {
        self.a_unit(column, |sample| sample.cpu)
    }

    fn client_cpu(&self, column: Column) -> Option<f64> {
        self.a_unit(column, |sample| sample.client_cpu)
    }

    fn a_unit(&self, column: Column, of: fn(&Sample) -> f64) -> Option<f64> {
        let samples = self.samples(column)?;
        let amount: f64 = samples.iter().map(|sample| sample.amount).sum();
        (amount > 0.0).then(|| samples.iter().map(of).sum::<f64>() / amount)
    }

    fn cpu_text(&self, cpu: f64) -> String {
        match self.unit {
            Unit::Gigabyte => format!("{cpu:.2}"),
            Unit::Request => format!("{:.0}", cpu * 1e6),
        }
    }

    /// Gigabytes or requests a second, in the median round.
    pub fn rate(&self, column: Column) -> Option<f64> {
        let sample = self.samples(column)?.first()?;
        let units = sample.amount / sample.times as f64;
        (units > 0.0).then_some(units / self.time(column)?)
    }

    fn rate_text(&self, rate: f64) -> String {
        match self.unit {
            Unit::Gigabyte => format!("{:.0}", rate * 1e3),
            Unit::Request => format!("{rate:.0}"),
        }
    }

    fn memory(&self, column: Column) -> Option<f64> {
        let memory = self.samples(column)?.iter().map(|sample| sample.memory);
        let memory = sorted(memory)?;
        Some(memory[memory.len() / 2])
    }

    fn peak(&self, column: Column) -> Option<f64> {
        let peak = self
            .samples(column)?
            .iter()
            .map(|sample| sample.peak)
            .max()?;
        Some(peak as f64 / 1024.0)
    }

    fn fetches(&self, column: Column) -> Option<usize> {
        let samples = self.samples(column)?.iter();
        samples.map(|sample| sample.fetches).max()
    }
}

fn sorted(values: impl Iterator<Item = Option<f64>>) -> Option<Vec<f64>> {
    let mut values: Vec<_> = values.flatten().collect();
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then_some(values)
}

fn human(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2}s"),
        s if s >= 0.01 => format!("{:.0}ms", s * 1e3),
        s if s >= 0.001 => format!("{:.2}ms", s * 1e3),
        s => format!("{:.0}us", s * 1e6),
    }
}
