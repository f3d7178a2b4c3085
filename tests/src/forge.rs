// SPDX-License-Identifier: Apache-2.0
//! State files taken apart and put together by hand, with a checksum that holds: what a snapshot
//! looks like that was changed on purpose. Written from the description of the format, without the
//! program's own code, so that both cannot be wrong alike.

use serde_json::Value;
use sha2::{Digest, Sha256};

const HEADER: usize = 64;
const SECTION_HEADER: usize = 32;
const CHECKSUM: std::ops::Range<usize> = 32..64;

/// A section, to be changed at will.
#[derive(Clone, Debug)]
pub struct Section {
    /// What it is of.
    pub kind: String,
    /// Which one of these.
    pub id: u32,
    /// Of its form.
    pub version: u32,
    /// Its JSON.
    pub payload: Vec<u8>,
}

impl Section {
    /// What it holds.
    ///
    /// # Panics
    ///
    /// It is not JSON.
    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.payload).expect("JSON")
    }
}

/// A state file, to be changed at will.
#[derive(Clone, Debug)]
pub struct Forged {
    /// Of the layout.
    pub format: u32,
    /// `e_machine` of an ELF file.
    pub architecture: u32,
    /// In their order.
    pub sections: Vec<Section>,
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn length(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize
}

impl Forged {
    /// Takes a good state file apart.
    ///
    /// # Panics
    ///
    /// It is not one.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(&bytes[..8], b"BRUMESNP");
        assert_eq!(length(bytes, 24), bytes.len());
        let borders = borders(bytes);
        let sections = borders.iter().map(|&at| {
            let kind = &bytes[at..at + 16];
            let payload = at + SECTION_HEADER;
            Section {
                kind: String::from_utf8_lossy(kind)
                    .trim_end_matches('\0')
                    .to_owned(),
                id: number(bytes, at + 16),
                version: number(bytes, at + 20),
                payload: bytes[payload..payload + length(bytes, at + 24)].to_vec(),
            }
        });
        Self {
            format: number(bytes, 8),
            architecture: number(bytes, 12),
            sections: sections.collect(),
        }
    }

    /// The file, with a right length, count and checksum.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"BRUMESNP".to_vec();
        let count = self.sections.len() as u32;
        for field in [self.format, self.architecture, count, 0] {
            file.extend(field.to_le_bytes());
        }
        file.resize(HEADER, 0);
        for section in &self.sections {
            let mut kind = section.kind.clone().into_bytes();
            kind.resize(16, 0);
            file.extend(kind);
            file.extend(section.id.to_le_bytes());
            file.extend(section.version.to_le_bytes());
            file.extend((section.payload.len() as u64).to_le_bytes());
            file.extend(&section.payload);
        }
        let all = file.len() as u64;
        file[24..32].copy_from_slice(&all.to_le_bytes());
        let sum = Sha256::digest(&file);
        file[CHECKSUM].copy_from_slice(&sum);
        file
    }

    /// Changes what the section `kind` 0 holds.
    ///
    /// # Panics
    ///
    /// It is not there.
    #[must_use]
    pub fn with(mut self, kind: &str, change: impl FnOnce(&mut Value)) -> Self {
        let section = self.sections.iter_mut().find(|one| one.kind == kind);
        let section = section.expect("the section");
        let mut value = section.value();
        change(&mut value);
        section.payload = value.to_string().into_bytes();
        self
    }
}

/// Where the sections of a good state file begin.
pub fn borders(bytes: &[u8]) -> Vec<usize> {
    let mut borders = Vec::new();
    let mut at = HEADER;
    while at < bytes.len() {
        borders.push(at);
        at += SECTION_HEADER + length(bytes, at + 24);
    }
    borders
}

/// Numbers that follow from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From `$BRUME_SEED`, or `default`; the seed is printed, for whoever has to repeat it.
    ///
    /// # Panics
    ///
    /// The variable is no number.
    pub fn seeded(what: &str, default: u64) -> Self {
        let given = std::env::var("BRUME_SEED").ok();
        let seed = given.map_or(default, |text| text.parse().expect("BRUME_SEED: a number"));
        println!("{what}: BRUME_SEED={seed}");
        Self(seed)
    }

    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The next one, below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
