// SPDX-License-Identifier: Apache-2.0
//! Pages in a frame: a table of runs, then the bytes of those runs that have any, one after the
//! other.
//!
//! An entry of the table has 16 bytes, little endian: the number of the first page (u64), how many
//! there are (u32), flags (u32; bit 0: they are zeros, and have no bytes).

use std::io;
use std::ops::Range;

use crate::channel::ChannelError;

/// The size of a page in bytes.
pub const PAGE: usize = 4096;
/// The most pages with bytes in a frame.
pub const MOST_PAGES: usize = 128;
/// The most pages of zeros in a frame: 1 GiB of them. Each has to be looked at where they arrive, and
/// while that goes on nothing else is heard.
pub(crate) const MOST_ZEROS: usize = 1 << 18;
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

/// The most that the number of a page, and the end of a run, may be: their addresses are numbers of
/// 64 bits.
const MOST_PAGE: u64 = 1 << 52;

/// Pages on their way into a frame. It is used again and again: its room is made once.
#[derive(Debug, Default)]
pub struct PageBatch {
    runs: Vec<Run>,
    /// Room for pages; never made smaller, for what it grows by is filled with zeros.
    room: Vec<u8>,
    /// How much of the room has pages in it, in bytes.
    used: usize,
    zero_pages: u64,
    /// How many of them are told of.
    told_zeros: usize,
}

impl PageBatch {
    /// A batch with nothing in it. All of its room is there: to get it takes longer than to fill it,
    /// and a guest may stand still when it is used first.
    pub fn new() -> Self {
        let mut batch = Self::default();
        batch.room.resize(MOST_PAGES * PAGE, 0);
        batch
    }

    /// Takes everything out of it.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.used = 0;
        self.zero_pages = 0;
        self.told_zeros = 0;
    }

    /// Adds `pages` pages from `first` on; `copy` is given the place for their bytes, and fills
    /// it: what is there are bytes of pages that were sent before.
    ///
    /// There may be no more of them than [`PageBatch::left`] says: a batch with more is not sent.
    pub fn push_run(&mut self, first: u64, pages: u32, zeros: Zeros, copy: impl FnOnce(&mut [u8])) {
        let begin = self.used;
        let end = begin + pages as usize * PAGE;
        copy(self.place(begin, end));
        self.sort_out(first, begin..end, zeros);
    }

    /// Adds one page, as [`PageBatch::push_run`] does, if `copy` gets hold of it.
    ///
    /// # Errors
    ///
    /// Those of `copy`; the batch is what it was before.
    pub fn push(
        &mut self,
        page: u64,
        zeros: Zeros,
        copy: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let begin = self.used;
        let end = begin + PAGE;
        copy(self.place(begin, end))?;
        self.sort_out(page, begin..end, zeros);
        Ok(())
    }

    fn place(&mut self, begin: usize, end: usize) -> &mut [u8] {
        if self.room.len() < end {
            self.room.resize(end.max(MOST_PAGES * PAGE), 0);
        }
        self.room.get_mut(begin..end).unwrap_or_default()
    }

    /// Makes runs of the pages in `new`, and takes out those that are zeros.
    fn sort_out(&mut self, first: u64, new: Range<usize>, zeros: Zeros) {
        let mut kept = new.start;
        for (page, from) in (first..).zip(new.step_by(PAGE)) {
            let bytes = self.room.get(from..from + PAGE).unwrap_or_default();
            if is_zero(bytes) {
                self.zero_pages += 1;
                if zeros == Zeros::Told {
                    self.told_zeros += 1;
                    self.add(page, true);
                }
            } else {
                if kept != from {
                    self.room.copy_within(from..from + PAGE, kept);
                }
                kept += PAGE;
                self.add(page, false);
            }
        }
        self.used = kept;
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

    /// How many more pages there is room for, whatever they are.
    pub fn left(&self) -> usize {
        let pages = MOST_PAGES.saturating_sub(self.used / PAGE);
        let runs = MOST_RUNS.saturating_sub(self.runs.len());
        let zeros = MOST_ZEROS.saturating_sub(self.told_zeros);
        pages.min(runs).min(zeros)
    }

    /// Whether there is no room for another page.
    pub fn is_full(&self) -> bool {
        self.left() == 0
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many pages with bytes there are.
    pub fn data_pages(&self) -> u64 {
        (self.used / PAGE) as u64
    }

    /// How many pages of zeros there were.
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// How many pages of zeros are told of.
    pub(crate) fn told_zeros(&self) -> usize {
        self.told_zeros
    }

    /// How many runs there are.
    pub(crate) fn runs(&self) -> usize {
        self.runs.len()
    }

    /// The bytes of the pages.
    pub(crate) fn data(&self) -> &[u8] {
        self.room.get(..self.used).unwrap_or_default()
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
        let (mut pages, mut zeros): (usize, usize) = (0, 0);
        for run in table.chunks_exact(ENTRY).map(read_run) {
            let run = run?;
            let sum = if run.zeros { &mut zeros } else { &mut pages };
            *sum = sum.saturating_add(run.pages as usize);
        }
        if zeros > MOST_ZEROS {
            return Err(ChannelError::Malformed(
                "more pages of zeros than a frame may have",
            ));
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

    /// The runs, each with its bytes unless it is of zeros. Their addresses fit into 64 bits.
    /// Whether the machine has such pages is not known here, nor that none comes twice.
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
    let end = run.first.checked_add(u64::from(run.pages));
    if run.pages == 0 || end.is_none_or(|end| end > MOST_PAGE) {
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
    fn pages_are_added_one_by_one_until_it_is_full() {
        let mut batch = PageBatch::new();
        let fill = |byte| {
            move |place: &mut [u8]| -> io::Result<()> {
                place.fill(byte);
                Ok(())
            }
        };
        batch.push(3, Zeros::Told, fill(1)).unwrap();
        batch.push(4, Zeros::Told, fill(2)).unwrap();
        let failed = batch.push(5, Zeros::Told, |_| Err(io::ErrorKind::NotFound.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
        batch.push(5, Zeros::Told, fill(0)).unwrap();
        assert_eq!(runs(&batch), [(3, 2, Some(1)), (5, 1, None)]);
        assert_eq!(batch.left(), MOST_PAGES - 2);
        for page in 0..MOST_PAGES as u64 - 2 {
            assert!(!batch.is_full());
            batch.push(2 * page, Zeros::Told, fill(9)).unwrap();
        }
        assert!(batch.is_full());
        // What was in it before is not there any more.
        batch.clear();
        assert!(batch.is_empty() && batch.left() == MOST_PAGES);
        batch.push(8, Zeros::Absent, fill(0)).unwrap();
        assert!(batch.is_empty() && batch.data().is_empty());
        // Zeros that are told take no bytes, but room in the table.
        for page in 0..MOST_RUNS as u64 {
            assert!(!batch.is_full());
            batch.push(2 * page, Zeros::Told, fill(0)).unwrap();
        }
        assert!(batch.is_full());
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
        let most_zeros = u32::try_from(MOST_ZEROS).unwrap();
        let entry = |first: u64, pages: u32, flags: u32| {
            let first = first.to_le_bytes();
            [&first[..], &pages.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        for table in [
            entry(0, 0, 0),
            entry(0, 1, 2),
            entry(u64::MAX, 1, 1),
            entry(MOST_PAGE, 1, 1),
            entry(0, 129, 0),
            entry(0, 1, 0),
            entry(0, u32::MAX, 1),
            entry(0, most_zeros, 1).repeat(512),
            [entry(0, most_zeros, 1), entry(0, 1, 1)].concat(),
        ] {
            assert!(PagesIn::new(&table, &[]).is_err(), "{table:?}");
        }
        assert!(PagesIn::new(&entry(0, 1, 0), &[0; 2 * PAGE]).is_err());
        PagesIn::new(&entry(MOST_PAGE - 1, 1, 1), &[]).unwrap();
        PagesIn::new(&entry(0, most_zeros, 1), &[]).unwrap();
        assert!(PagesIn::table_length(513).is_err());
    }
}
