//! A [`Timestamp`] as PostgreSQL's `timestamptz`.
//!
//! Owns the conversion, which is exact in both directions for every millisecond that the type can hold. Later (or earlier) than that is
//! stored as `infinity` (`-infinity`) and read back as the end (beginning) of time.

use sqlx::{
    Decode, Encode, Postgres, Type,
    encode::IsNull,
    error::BoxDynError,
    postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueRef, types::Oid},
};

use crate::model::Timestamp;

const TIMESTAMPTZ: Oid = Oid(1184);
const TIMESTAMPTZ_ARRAY: Oid = Oid(1185);

/// 2000-01-01T00:00:00Z, from where the server counts, in milliseconds since the Unix epoch.
const SERVER_EPOCH_MILLIS: i64 = 946_684_800_000;

/// The first microsecond that is out of range: 294277-01-01, in microseconds since the server's epoch.
const SERVER_MICROS_END: i64 = 9_223_371_331_200_000_000;

/// The first microsecond that is in range: 4713-11-24 BC.
const SERVER_MICROS_BEGIN: i64 = -211_813_488_000_000_000;

/// A time on the wire: microseconds since the server's epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WireTime(pub(super) Timestamp);

impl WireTime {
    fn to_server_micros(self) -> i64 {
        let micros = self
            .0
            .0
            .checked_sub(SERVER_EPOCH_MILLIS)
            .and_then(|millis| millis.checked_mul(1_000));
        match micros {
            Some(micros) if micros < SERVER_MICROS_BEGIN => i64::MIN,
            Some(micros) if micros >= SERVER_MICROS_END => i64::MAX,
            Some(micros) => micros,
            None if self.0.0 < 0 => i64::MIN,
            None => i64::MAX,
        }
    }

    /// Rounds down to the millisecond, should somebody else have written a finer time.
    fn from_server_micros(micros: i64) -> WireTime {
        WireTime(Timestamp(match micros {
            i64::MIN | i64::MAX => micros,
            _ => micros.div_euclid(1_000) + SERVER_EPOCH_MILLIS,
        }))
    }
}

impl Type<Postgres> for WireTime {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(TIMESTAMPTZ)
    }

    fn compatible(column: &PgTypeInfo) -> bool {
        column.oid() == Some(TIMESTAMPTZ)
    }
}

impl PgHasArrayType for WireTime {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(TIMESTAMPTZ_ARRAY)
    }
}

impl Encode<'_, Postgres> for WireTime {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buffer.extend(self.to_server_micros().to_be_bytes());
        Ok(IsNull::No)
    }
}

impl Decode<'_, Postgres> for WireTime {
    fn decode(value: PgValueRef<'_>) -> Result<WireTime, BoxDynError> {
        let micros = <i64 as Decode<Postgres>>::decode(value)?;
        Ok(WireTime::from_server_micros(micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_millisecond_in_range_is_exact() {
        for millis in [
            0,
            1,
            -1,
            999,
            SERVER_EPOCH_MILLIS,
            1_700_000_000_123,
            253_402_300_799_999,
        ] {
            let time = WireTime(Timestamp(millis));
            assert_eq!(WireTime::from_server_micros(time.to_server_micros()), time, "{millis}");
        }
    }

    #[test]
    fn beyond_the_range_lies_infinity() {
        assert_eq!(WireTime(Timestamp(i64::MAX)).to_server_micros(), i64::MAX);
        let end = Timestamp(SERVER_MICROS_END / 1_000 + SERVER_EPOCH_MILLIS);
        assert_eq!(WireTime(end).to_server_micros(), i64::MAX);
        assert!(WireTime(Timestamp(end.0 - 1)).to_server_micros() < SERVER_MICROS_END);
        assert_eq!(WireTime(Timestamp(i64::MIN)).to_server_micros(), i64::MIN);
        assert_eq!(WireTime(Timestamp(-300_000_000_000_000)).to_server_micros(), i64::MIN);
    }
}
