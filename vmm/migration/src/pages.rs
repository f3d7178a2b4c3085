// SPDX-License-Identifier: Apache-2.0
//! Pages in a frame: a table of runs, then the bytes of those runs that have any, one after the
//! other.
//!
//! An entry of the table has 16 bytes, little endian: the number of the first page (u64), how many
//! there are (u32), flags (u32; bit 0: they are zeros, and have no bytes).

use crate::channel::ChannelError;

/// The size of a page in bytes.
pub const PAGE: usize = 4096;
/// The most pages with bytes in a frame.
pub const MOST_PAGES: usize = 128;
/// The most runs in a frame.
pub(crate) const MOST_RUNS: usize = 512;
/// The size of an entry of the table in bytes.
const ENTRY: usize = 16;
const ZEROS: u32 = 1;

/// What is said of pages of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// Nothing: the target has zeros there already.
    Absent,
    /// That they are zeros now.
    Told,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The number of the first.
    pub first: u64,
    /// How many there are.
    pub pages: u32,
    /// Whether they are zeros.
    pub zeros: bool,
}

/// Pages on their way into a frame.
#[derive(Debug, Default)]
pub struct PageBatch {
    runs: Vec<Run>,
    data: Vec<u8>,
    zero_pages: u64,
}

impl PageBatch {
    /// A batch with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes everything out of it.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.data.clear();
        self.zero_pages = 0;
    }

    /// Adds `pages` pages from `first` on; `copy` is given the place for their bytes, and fills it.
    pub fn push_run(&mut self, first: u64, pages: u32, zeros: Zeros, copy: impl FnOnce(&mut [u8])) {
        let begin = self.data.len();
        let end = begin + pages as usize * PAGE;
        // Grows to its largest size once, and is not filled with zeros again.
        if self.data.capacity() < end {
            self.data.reserve(MOST_PAGES.max(pages as usize) * PAGE);
        }
        self.data.resize(end, 0);
        copy(self.data.get_mut(begin..end).unwrap_or_default());
        self.sort_out(first, begin, zeros);
    }

    /// Makes runs of the pages at `begin` and after it, and takes out those that are zeros.
    fn sort_out(&mut self, first: u64, begin: usize, zeros: Zeros) {
        let mut kept = begin;
        let mut from = begin;
        let mut page = first;
        while let Some(bytes) = self.data.get(from..from + PAGE) {
            if is_zero(bytes) {
                self.zero_pages += 1;
                if zeros == Zeros::Told {
                    self.add(page, true);
                }
            } else {
                if kept != from {
                    self.data.copy_within(from..from + PAGE, kept);
                }
                kept += PAGE;
                self.add(page, false);
            }
            from += PAGE;
            page += 1;
        }
        self.data.truncate(kept);
    }

    fn add(&mut self, page: u64, zeros: bool) {
        match self.runs.last_mut() {
            Some(run) if run.zeros == zeros && run.first + u64::from(run.pages) == page => {
                run.pages += 1;
            }
            _ => self.runs.push(Run {
                first: page,
                pages: 1,
                zeros,
            }),
        }
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many pages with bytes there are.
    pub fn data_pages(&self) -> u64 {
        (self.data.len() / PAGE) as u64
    }

    /// How many pages of zeros there were.
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// The bytes of the pages.
    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    /// How many runs there are, and their table, which is put into `table`.
    pub(crate) fn table(&self, table: &mut Vec<u8>) -> u32 {
        table.clear();
        for run in &self.runs {
            table.extend_from_slice(&run.first.to_le_bytes());
            table.extend_from_slice(&run.pages.to_le_bytes());
            let flags = if run.zeros { ZEROS } else { 0 };
            table.extend_from_slice(&flags.to_le_bytes());
        }
        u32::try_from(self.runs.len()).unwrap_or(u32::MAX)
    }
}

fn is_zero(page: &[u8]) -> bool {
    // Most pages with something in them have it at their beginning.
    let (head, rest) = page.split_at(page.len().min(64));
    head.iter().all(|&byte| byte == 0) && {
        let mut chunks = rest.chunks_exact(64);
        chunks.all(|chunk| {
            let words = chunk.chunks_exact(8);
            words.fold(0, |all, word| {
                all | word.try_into().map_or(1, u64::from_ne_bytes)
            }) == 0
        })
    }
}

/// Pages that have come.
#[derive(Clone, Copy, Debug)]
pub struct PagesIn<'a> {
    table: &'a [u8],
    data: &'a [u8],
}

impl<'a> PagesIn<'a> {
    /// How long the table of `count` runs is, in bytes.
    pub(crate) fn table_length(count: u32) -> Result<usize, ChannelError> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > MOST_RUNS {
            return Err(ChannelError::Malformed(
                "more runs of pages than a frame may have",
            ));
        }
        Ok(count * ENTRY)
    }

    /// How many bytes the pages of a table have.
    pub(crate) fn data_length(table: &[u8]) -> Result<usize, ChannelError> {
        let mut pages: usize = 0;
        for run in table.chunks_exact(ENTRY).map(read_run) {
            let run = run?;
            if !run.zeros {
                pages = pages.saturating_add(run.pages as usize);
            }
        }
        if pages > MOST_PAGES {
            return Err(ChannelError::Malformed("more pages than a frame may have"));
        }
        Ok(pages * PAGE)
    }

    /// Pages of a table and their bytes, which have the length that the table says.
    pub(crate) fn new(table: &'a [u8], data: &'a [u8]) -> Result<Self, ChannelError> {
        if Self::data_length(table)? != data.len() {
            return Err(ChannelError::Malformed(
                "pages with more or fewer bytes than they have",
            ));
        }
        Ok(Self { table, data })
    }

    /// The runs, each with its bytes unless it is of zeros.
    pub fn runs(self) -> impl Iterator<Item = (Run, Option<&'a [u8]>)> {
        let mut data = self.data;
        // The table was read once before, so nothing of it is left out.
        let runs = self.table.chunks_exact(ENTRY).flat_map(read_run);
        runs.map(move |run| {
            if run.zeros {
                return (run, None);
            }
            let length = (run.pages as usize * PAGE).min(data.len());
            let (bytes, rest) = data.split_at(length);
            data = rest;
            (run, Some(bytes))
        })
    }
}

fn read_run(entry: &[u8]) -> Result<Run, ChannelError> {
    let bad = || ChannelError::Malformed("a run of pages that cannot be");
    let entry: [u8; ENTRY] = entry.try_into().map_err(|_| bad())?;
    let [
        f0,
        f1,
        f2,
        f3,
        f4,
        f5,
        f6,
        f7,
        p0,
        p1,
        p2,
        p3,
        g0,
        g1,
        g2,
        g3,
    ] = entry;
    let run = Run {
        first: u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]),
        pages: u32::from_le_bytes([p0, p1, p2, p3]),
        zeros: match u32::from_le_bytes([g0, g1, g2, g3]) {
            0 => false,
            ZEROS => true,
            _ => return Err(bad()),
        },
    };
    if run.pages == 0 || run.first.checked_add(u64::from(run.pages)).is_none() {
        return Err(bad());
    }
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE]
    }

    fn batch(zeros: Zeros, bytes: &[u8]) -> PageBatch {
        let mut batch = PageBatch::new();
        let all: Vec<u8> = bytes.iter().flat_map(|&byte| page(byte)).collect();
        let pages = u32::try_from(bytes.len()).unwrap();
        batch.push_run(7, pages, zeros, |place| place.copy_from_slice(&all));
        batch
    }

    fn runs(batch: &PageBatch) -> Vec<(u64, u32, Option<u8>)> {
        let mut table = Vec::new();
        let count = batch.table(&mut table);
        assert_eq!(PagesIn::table_length(count).unwrap(), table.len());
        let pages = PagesIn::new(&table, batch.data()).unwrap();
        let run = |(run, bytes): (Run, Option<&[u8]>)| {
            assert_eq!(run.zeros, bytes.is_none());
            (run.first, run.pages, bytes.map(|bytes| bytes[0]))
        };
        pages.runs().map(run).collect()
    }

    #[test]
    fn pages_of_zeros_have_no_bytes() {
        let bytes = [1, 1, 0, 0, 2, 0];
        let absent = batch(Zeros::Absent, &bytes);
        assert_eq!(runs(&absent), [(7, 2, Some(1)), (11, 1, Some(2))]);
        let told = batch(Zeros::Told, &bytes);
        assert_eq!(
            runs(&told),
            [
                (7, 2, Some(1)),
                (9, 2, None),
                (11, 1, Some(2)),
                (12, 1, None)
            ]
        );
        for batch in [absent, told] {
            assert_eq!((batch.data_pages(), batch.zero_pages()), (3, 3));
        }
        assert!(batch(Zeros::Absent, &[0, 0]).is_empty());
    }

    #[test]
    fn one_byte_anywhere_is_something() {
        let mut bytes = page(0);
        assert!(is_zero(&bytes));
        for at in 0..PAGE {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }

    #[test]
    fn tables_that_cannot_be_are_refused() {
        let entry = |first: u64, pages: u32, flags: u32| {
            let first = first.to_le_bytes();
            [&first[..], &pages.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        for table in [
            entry(0, 0, 0),
            entry(0, 1, 2),
            entry(u64::MAX, 1, 1),
            entry(0, 129, 0),
            entry(0, 1, 0),
        ] {
            assert!(PagesIn::new(&table, &[]).is_err(), "{table:?}");
        }
        assert!(PagesIn::new(&entry(0, 1, 0), &[0; 2 * PAGE]).is_err());
        PagesIn::new(&entry(u64::MAX - 1, 1, 1), &[]).unwrap();
        assert!(PagesIn::table_length(513).is_err());
    }
}
