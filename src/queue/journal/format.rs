//! The bytes of the journal: segments, the groups in them, the records in those.
//!
//! Owns their layout and their checks, both ways. Does no I/O. All numbers are little-endian.
//!
//! A **segment** is a file: a header of one sector (magic, format version, check, id, mark, length of the file), then groups. Its *mark*
//! is random and new each time that a file becomes a segment: each group repeats it under its check, so neither what an earlier life
//! of the file left behind, nor a copy of a group within somebody's value, is ever taken for a group.
//!
//! A **group** is what one fdatasync covers: a header (magic, check, mark, sequence, number of its first record, `released_below`,
//! number of records, length of the body), then the body. One CRC32C covers all of it. It lies within one segment, aligned to 8.
//! Sequences are consecutive through all segments, and so are the numbers of records.
//!
//! A **record** is a protobuf message (`tidegate.journal.v1.Record`) behind its length.

use std::ops::Range;

use prost::Message;

use crate::model::{Answer, Answered, Entry, Fingerprint, Key, Request, RequestId, Tags, Timestamp, Version, Write};

/// The generated code of `tidegate.journal.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/tidegate.journal.v1.rs"));
}

/// The version of this format. A later one is refused; an earlier one would be read.
pub(super) const FORMAT: u32 = 1;

/// The length of a segment's header: one sector, so that no write of a group touches the sector of the header.
pub(super) const SEGMENT_HEADER_BYTES: usize = 512;
/// The length of a group's header.
pub(super) const GROUP_HEADER_BYTES: usize = 48;
/// What groups are aligned to.
pub(super) const ALIGNMENT: usize = 8;
/// What a record is charged beyond its own bytes: it may be alone in its group.
pub(super) const CHARGE_OVERHEAD_BYTES: usize = GROUP_HEADER_BYTES + ALIGNMENT;

const SEGMENT_MAGIC: [u8; 8] = *b"TIDEGATE";
const GROUP_MAGIC: [u8; 4] = *b"TGrp";

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    /// Its place among the segments: one more than the one before.
    pub(super) id: u64,
    /// What its groups repeat.
    pub(super) mark: u64,
    /// The length of the file.
    pub(super) bytes: u64,
}

/// Why a file is not taken for a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// It is shorter than a header.
    Short,
    /// It begins like no segment.
    Foreign,
    /// A later format.
    Newer(u32),
    /// It begins like a segment, and its header is damaged.
    Damaged,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.id.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.mark.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.bytes.to_le_bytes());
        let check = segment_check(&bytes);
        bytes[12..16].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<SegmentHeader, HeaderFault> {
        let header = bytes.get(..SEGMENT_HEADER_BYTES).ok_or(HeaderFault::Short)?;
        if header[..8] != SEGMENT_MAGIC {
            return Err(HeaderFault::Foreign);
        }
        // Before the check, which a later format may place elsewhere.
        match u32_at(header, 8) {
            FORMAT => {}
            0 => return Err(HeaderFault::Damaged),
            newer => return Err(HeaderFault::Newer(newer)),
        }
        if u32_at(header, 12) != segment_check(header) {
            return Err(HeaderFault::Damaged);
        }
        Ok(SegmentHeader {
            id: u64_at(header, 16),
            mark: u64_at(header, 24),
            bytes: u64_at(header, 32),
        })
    }
}

/// The check of a segment's header: of all of it but the check itself.
fn segment_check(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..SEGMENT_HEADER_BYTES])
}

/// The header of a group, without its mark and check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupHeader {
    /// Its place among all groups.
    pub(super) sequence: u64,
    /// The number of its first record; the others follow.
    pub(super) first_record: u64,
    /// Records below this number were released when the group was written.
    pub(super) released_below: u64,
    /// How many records it holds: none, when it was written to tell `released_below`.
    pub(super) records: u32,
    /// The length of its body.
    pub(super) body_bytes: u32,
}

impl GroupHeader {
    /// The number that the record after its last has.
    pub(super) fn next_record(&self) -> u64 {
        self.first_record + u64::from(self.records)
    }

    /// How many bytes the group takes in its segment.
    pub(super) fn group_bytes(&self) -> usize {
        group_bytes(self.body_bytes as usize)
    }

    /// Completes a group: `buffer` holds room for the header, and the body.
    pub(super) fn seal(&self, mark: u64, buffer: &mut Vec<u8>) {
        buffer[..4].copy_from_slice(&GROUP_MAGIC);
        buffer[8..16].copy_from_slice(&mark.to_le_bytes());
        buffer[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        buffer[24..32].copy_from_slice(&self.first_record.to_le_bytes());
        buffer[32..40].copy_from_slice(&self.released_below.to_le_bytes());
        buffer[40..44].copy_from_slice(&self.records.to_le_bytes());
        buffer[44..48].copy_from_slice(&self.body_bytes.to_le_bytes());
        let check = group_check(buffer);
        buffer[4..8].copy_from_slice(&check.to_le_bytes());
        buffer.resize(self.group_bytes(), 0);
    }

    /// The mark in the header that `bytes` begin with, if it looks like one; not checked.
    pub(super) fn peek_mark(bytes: &[u8]) -> Option<u64> {
        let header = bytes.get(..GROUP_HEADER_BYTES)?;
        header.starts_with(&GROUP_MAGIC).then(|| u64_at(header, 8))
    }

    /// The header that `bytes` begin with, if it looks like one of a segment's; not checked.
    pub(super) fn peek(mark: u64, bytes: &[u8]) -> Option<GroupHeader> {
        if GroupHeader::peek_mark(bytes)? != mark {
            return None;
        }
        let header = bytes.get(..GROUP_HEADER_BYTES)?;
        Some(GroupHeader {
            sequence: u64_at(header, 16),
            first_record: u64_at(header, 24),
            released_below: u64_at(header, 32),
            records: u32_at(header, 40),
            body_bytes: u32_at(header, 44),
        })
    }

    /// The header of the whole and undamaged group that `bytes` begin with, if they do.
    pub(super) fn verify(mark: u64, bytes: &[u8]) -> Option<GroupHeader> {
        let header = GroupHeader::peek(mark, bytes)?;
        let group = bytes.get(..GROUP_HEADER_BYTES.checked_add(header.body_bytes as usize)?)?;
        (u32_at(group, 4) == group_check(group)).then_some(header)
    }
}

/// How many bytes a group with such a body takes in its segment.
pub(super) fn group_bytes(body_bytes: usize) -> usize {
    (GROUP_HEADER_BYTES + body_bytes).next_multiple_of(ALIGNMENT)
}

/// The check of a group: of all of it but the check itself.
fn group_check(group: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&group[..4]), &group[8..])
}

/// The offset of the first thing in `bytes` that looks like the header of a segment's group; not checked. `bytes` begin where a group may.
pub(super) fn find_header(mark: u64, bytes: &[u8]) -> Option<usize> {
    let last = bytes.len().checked_sub(GROUP_HEADER_BYTES)?;
    let starts = bytes[..last + ALIGNMENT].chunks_exact(ALIGNMENT).enumerate();
    starts
        .filter(|(_, start)| start.starts_with(&GROUP_MAGIC))
        .map(|(index, _)| index * ALIGNMENT)
        .find(|offset| GroupHeader::peek(mark, &bytes[*offset..]).is_some())
}

/// The bytes of a group's body hold something else than its header says, although the check is right: another program wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// A record as it lies in a group: its length, then the message. Of its requests it has the first: a write that is accepted has no other.
pub(super) fn encode_record(write: &Write) -> Vec<u8> {
    let request = write.requests.first().map(|answered| &answered.request);
    proto::Record {
        namespace: write.key.namespace().to_owned(),
        key: write.key.key().to_owned(),
        version: write.entry.version.get(),
        value: write.entry.value.clone(),
        expire_time_millis: write.entry.expires_at.map(|at| at.0),
        tags: write.tags.iter().map(str::to_owned).collect(),
        request_id: request.map_or_else(String::new, |request| request.id.as_str().to_owned()),
        request_fingerprint: request
            .map_or_else(Vec::new, |request| request.fingerprint.0.to_vec())
            .into(),
        request_end_millis: request.map_or(0, |request| request.ends_at.0),
    }
    .encode_length_delimited_to_vec()
}

/// The write that a record holds.
pub(super) fn decode_record(mut record: &[u8]) -> Result<Write, Malformed> {
    let record = proto::Record::decode_length_delimited(&mut record).map_err(|_| Malformed)?;
    let requests = match decode_request(&record)? {
        Some(request) => vec![Answered {
            request,
            answer: Answer {
                version: Version::new(record.version).ok_or(Malformed)?,
                counter: None,
                expires_at: record.expire_time_millis.map(Timestamp),
            },
        }],
        None => Vec::new(),
    };
    Ok(Write {
        key: Key::new(&record.namespace, &record.key).map_err(|_| Malformed)?,
        entry: Entry {
            version: Version::new(record.version).ok_or(Malformed)?,
            value: record.value,
            expires_at: record.expire_time_millis.map(Timestamp),
        },
        tags: Tags::new(&record.tags).map_err(|_| Malformed)?,
        requests,
    })
}

/// The request that a record's write came with.
fn decode_request(record: &proto::Record) -> Result<Option<Request>, Malformed> {
    if record.request_id.is_empty() {
        return Ok(None);
    }
    Ok(Some(Request {
        id: RequestId::new(&record.request_id).map_err(|_| Malformed)?,
        fingerprint: Fingerprint(record.request_fingerprint.as_ref().try_into().map_err(|_| Malformed)?),
        ends_at: Timestamp(record.request_end_millis),
    }))
}

/// The version of a record of which nothing else matters.
pub(super) fn decode_version(mut record: &[u8]) -> Result<Version, Malformed> {
    let stamp = proto::Stamp::decode_length_delimited(&mut record).map_err(|_| Malformed)?;
    Version::new(stamp.version).ok_or(Malformed)
}

/// Where the records of a body lie within it, each with its length.
pub(super) fn split_records(header: &GroupHeader, body: &[u8]) -> Result<Vec<Range<usize>>, Malformed> {
    let mut records = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let start = body.len() - rest.len();
        let length = prost::decode_length_delimiter(&mut rest).map_err(|_| Malformed)?;
        rest = rest.get(length..).ok_or(Malformed)?;
        records.push(start..body.len() - rest.len());
    }
    if records.len() != header.records as usize {
        return Err(Malformed);
    }
    Ok(records)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    const MARK: u64 = 0x1234_5678_9abc_def0;

    fn write(value: Option<&'static [u8]>, expires_at: Option<i64>) -> Write {
        Write {
            key: Key::new("orders", "κλειδί").expect("valid"),
            entry: Entry {
                version: Version::new(i64::MAX).expect("positive"),
                value: value.map(Bytes::from_static),
                expires_at: expires_at.map(Timestamp),
            },
            tags: Tags::default(),
            requests: Vec::new(),
        }
    }

    fn requested(write: Write, id: &str) -> Write {
        let answered = Answered {
            request: Request {
                id: RequestId::new(id).expect("valid"),
                fingerprint: Fingerprint(*b"sixteen bytes..."),
                ends_at: Timestamp(i64::MAX),
            },
            answer: Answer {
                version: write.entry.version,
                counter: None,
                expires_at: write.entry.expires_at,
            },
        };
        Write {
            requests: vec![answered],
            ..write
        }
    }

    fn group(writes: &[Write], released_below: u64) -> Vec<u8> {
        let mut bytes = vec![0; GROUP_HEADER_BYTES];
        for write in writes {
            bytes.extend(encode_record(write));
        }
        let header = GroupHeader {
            sequence: 7,
            first_record: 40,
            released_below,
            records: writes.len() as u32,
            body_bytes: (bytes.len() - GROUP_HEADER_BYTES) as u32,
        };
        header.seal(MARK, &mut bytes);
        bytes
    }

    #[test]
    fn records_come_back_whole_with_their_tombstones_expiries_tags_and_ids() {
        let writes = [
            write(Some(b"value"), None),
            write(Some(b""), Some(0)),
            write(None, None),
            write(None, Some(-1)),
            Write {
                tags: Tags::new(&["κόκκινο", "a\"b"]).expect("valid"),
                ..write(Some(b"tagged"), None)
            },
            requested(write(Some(b"once"), Some(7)), "κλειδί"),
            requested(write(None, None), &"x".repeat(64)),
        ];
        let bytes = group(&writes, 3);
        let header = GroupHeader::verify(MARK, &bytes).expect("whole");
        let body = &bytes[GROUP_HEADER_BYTES..][..header.body_bytes as usize];
        let records = split_records(&header, body).expect("well formed");
        let read: Vec<Write> = records
            .into_iter()
            .map(|record| {
                let record = &body[record];
                let write = decode_record(record).expect("well formed");
                assert_eq!(decode_version(record), Ok(write.entry.version));
                write
            })
            .collect();
        assert_eq!(read, writes);
        assert_eq!((header.next_record(), header.group_bytes()), (47, bytes.len()));
    }

    #[test]
    fn a_record_from_before_there_were_tags_has_none() {
        // Namespace `n`, key `k`, version 5, value `v`.
        let record = b"\x0b\x0a\x01n\x12\x01k\x18\x05\x22\x01v";
        let earlier = decode_record(record).expect("well formed");
        assert_eq!(earlier.tags, Tags::default());
        assert_eq!(encode_record(&earlier), record, "and one without tags is as it was");
    }

    #[test]
    fn a_record_with_tags_that_none_can_have_is_malformed() {
        for tags in [vec![""], vec!["t"; 17], vec!["a\0b"]] {
            let record = proto::Record {
                namespace: "n".to_owned(),
                key: "k".to_owned(),
                version: 5,
                tags: tags.into_iter().map(str::to_owned).collect(),
                ..proto::Record::default()
            };
            assert_eq!(decode_record(&record.encode_length_delimited_to_vec()), Err(Malformed));
        }
    }

    #[test]
    fn a_record_with_an_id_that_none_can_have_is_malformed() {
        for (id, fingerprint) in [("a\0b", 16), (&*"x".repeat(65), 16), ("id", 15), ("id", 0)] {
            let record = proto::Record {
                namespace: "n".to_owned(),
                key: "k".to_owned(),
                version: 5,
                request_id: id.to_owned(),
                request_fingerprint: vec![1; fingerprint].into(),
                ..proto::Record::default()
            };
            assert_eq!(decode_record(&record.encode_length_delimited_to_vec()), Err(Malformed));
        }
    }

    #[test]
    fn the_longest_record_fits_what_is_claimed_for_it() {
        let longest = Write {
            key: Key::new(&"n".repeat(63), &"k".repeat(1024)).expect("valid"),
            tags: Tags::new(&(0..16).map(|n| format!("{n:0128}")).collect::<Vec<_>>()).expect("valid"),
            entry: Entry {
                version: Version::new(i64::MAX).expect("positive"),
                value: Some(Bytes::from(vec![0; 1 << 24])),
                expires_at: Some(Timestamp(i64::MIN)),
            },
            requests: Vec::new(),
        };
        let mut longest = requested(longest, &"x".repeat(64));
        // Its varint is the longest.
        longest.requests[0].request.ends_at = Timestamp(-1);
        let claimed = longest.key.bytes() + longest.content_bytes() + super::super::config::RECORD_FRAME_BYTES;
        assert!(encode_record(&longest).len() <= claimed);
    }

    #[test]
    fn any_changed_bit_and_any_cut_of_a_group_is_noticed() {
        let bytes = group(&[write(Some(b"value"), Some(5))], 40);
        let header = GroupHeader::verify(MARK, &bytes).expect("whole");
        let length = GROUP_HEADER_BYTES + header.body_bytes as usize;
        for bit in 0..length * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(GroupHeader::verify(MARK, &changed), None, "bit {bit}");
        }
        for cut in 0..length {
            assert_eq!(GroupHeader::verify(MARK, &bytes[..cut]), None, "cut at {cut}");
        }
        assert_eq!(
            GroupHeader::verify(MARK + 1, &bytes),
            None,
            "of another life of the file"
        );
    }

    #[test]
    fn a_segment_header_says_what_is_wrong_with_it() {
        let header = SegmentHeader {
            id: 3,
            mark: MARK,
            bytes: 4096,
        };
        let bytes = header.encode();
        assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
        assert_eq!(SegmentHeader::decode(&bytes[..511]), Err(HeaderFault::Short));
        assert_eq!(SegmentHeader::decode(&[7; 512]), Err(HeaderFault::Foreign));
        assert_eq!(SegmentHeader::decode(&[0; 512]), Err(HeaderFault::Foreign));
        for byte in 8..SEGMENT_HEADER_BYTES {
            let mut changed = bytes;
            changed[byte] ^= 1;
            let expected = match byte {
                8..12 => u32_at(&changed, 8),
                _ => 0,
            };
            let expected = if expected == 0 {
                HeaderFault::Damaged
            } else {
                HeaderFault::Newer(expected)
            };
            assert_eq!(SegmentHeader::decode(&changed), Err(expected), "byte {byte}");
        }
    }

    #[test]
    fn a_group_is_found_behind_anything() {
        let mut bytes = vec![0xa5; 1000];
        let whole = group(&[write(None, None)], 0);
        bytes.extend(&whole);
        for cut in [0, 8, 1000] {
            assert_eq!(find_header(MARK, &bytes[cut..]), Some(1000 - cut));
            assert_eq!(
                find_header(MARK, &bytes[cut..1000 + GROUP_HEADER_BYTES]),
                Some(1000 - cut)
            );
            assert_eq!(find_header(MARK, &bytes[cut..1000 + GROUP_HEADER_BYTES - 1]), None);
        }
        assert_eq!(find_header(MARK, &bytes[1008..]), None);
        assert_eq!(find_header(MARK + 1, &bytes), None);
    }

    proptest! {
        /// Whatever lies in a file, reading it ends and does not panic.
        #[test]
        fn arbitrary_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), records in any::<u32>()) {
            let _ = decode_record(&bytes);
            let _ = decode_version(&bytes);
            let _ = find_header(u64::from(records), &bytes);
            let header = GroupHeader { sequence: 1, first_record: 1, released_below: 1, records, body_bytes: 0 };
            let _ = split_records(&header, &bytes);
            let _ = GroupHeader::verify(MARK, &bytes);
            let _ = SegmentHeader::decode(&bytes);
        }
    }
}
