// SPDX-License-Identifier: Apache-2.0
//! A part of a configuration that is an object or left out. What serde derives would take a list of
//! the values of the fields too, which is a mistake of whoever sends it.

use std::fmt::{Formatter, Result as FormatResult};
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// For `deserialize_with`; `null` stands for what is left out.
pub(crate) fn object<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_option(OptionalObject(PhantomData))
}

/// The same for a list of such parts, which is not left out.
pub(crate) fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let parts = Vec::<Object<T>>::deserialize(deserializer)?;
    Ok(parts.into_iter().map(|part| part.0).collect())
}

struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let part = OptionalObject(PhantomData).visit_some(deserializer)?;
        part.map(Self)
            .ok_or_else(|| D::Error::custom("an object is wanted"))
    }
}

struct OptionalObject<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OptionalObject<T> {
    type Value = Option<T>;

    fn expecting(&self, formatter: &mut Formatter<'_>) -> FormatResult {
        formatter.write_str("an object")
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Entropy;

    #[test]
    fn only_an_object_or_null_is_taken() {
        let read = serde_json::from_str::<Entropy>;
        for good in [
            r#"{"rate_limiter": null}"#,
            r#"{"rate_limiter": {}}"#,
            r#"{"rate_limiter": {"ops": {"size": 1, "refill_time": 1}, "bandwidth": null}}"#,
        ] {
            read(good).unwrap();
        }
        for (bad, text) in [
            (r#"{"rate_limiter": []}"#, "expected an object at line 1"),
            (r#"{"rate_limiter": {"ops": [1, null, 1]}}"#, "sequence"),
            (
                r#"{"rate_limiter": {"ops": null, "ops": null}}"#,
                "duplicate",
            ),
            (r#"{"rate_limiter": {"ops": {}}}"#, "missing field `size`"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(text), "{bad}: {error}");
        }
    }
}
