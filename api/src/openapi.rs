// SPDX-License-Identifier: Apache-2.0
//! The OpenAPI document of the control API. Paths come from the table of endpoints, schemas from
//! the types that requests are read into and answers are written from.
//!
//! It is made by the tests, which see to it that the files with it, `resources/openapi.yaml` for
//! people and `document.json` here for the program, are what the types say. So a machine has no
//! code for it, which would be in the memory of each.

mod endpoints;

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::openapi::extensions::Extensions;
use utoipa::openapi::header::Header;
use utoipa::openapi::path::{
    HttpMethod, Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, Paths,
};
use utoipa::openapi::request_body::{RequestBody, RequestBodyBuilder};
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::schema::{Components, ComponentsBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::{
    Content, ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Ref, RefOr,
    Required,
};
use utoipa::{PartialSchema, ToSchema};

use crate::events::Stamped;
use crate::fault::FaultBody;
use endpoints::ENDPOINTS;

/// What a client finds under the schemas of the document.
type Schemas = Vec<(String, RefOr<Schema>)>;

/// The refusals that are the same everywhere: status, name, and when they come.
const REFUSALS: [(&str, &str, &str); 3] = [
    (
        "400",
        "Refused",
        "The request is bad, comes at the wrong time, or cannot be carried out.",
    ),
    (
        "413",
        "TooLarge",
        "The body, or what would have to be kept of it, is larger than it may be.",
    ),
    (
        "503",
        "TooManyConnections",
        "Others use all connections that there may be.",
    ),
];

/// When an endpoint can be used.
#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    BeforeStart,
    AfterStart,
}

/// What a request carries.
#[derive(Clone, Copy)]
enum Carries {
    Nothing,
    /// A value, and one that is understood, as JSON.
    Value(Described, &'static str),
    /// The same, but it can be left out.
    Optional(Described, &'static str),
}

/// What a request that succeeds is answered with.
#[derive(Clone, Copy)]
enum Gives {
    /// Status 204.
    Nothing,
    /// Status 200 and JSON.
    Value(Described),
    /// Status 200 and a text of this media type.
    Text(&'static str),
    /// Only Firecracker has it; here it is refused.
    Refusal,
}

/// One method on one path.
struct Endpoint {
    method: HttpMethod,
    /// What is in braces stands for an id.
    path: &'static str,
    /// Firecracker's, where it has one: generated clients name their functions so.
    operation_id: &'static str,
    summary: &'static str,
    when: When,
    carries: Carries,
    gives: Gives,
    /// Whether something in the body is deprecated, which the answer tells.
    deprecates: bool,
    /// What may follow a `?` in the path.
    query: Option<Query>,
}

/// A parameter behind the path.
#[derive(Clone, Copy)]
struct Query {
    name: &'static str,
    description: &'static str,
    schema: fn() -> Schema,
}

impl Endpoint {
    const fn new(
        method: HttpMethod,
        path: &'static str,
        operation_id: &'static str,
        summary: &'static str,
    ) -> Self {
        Self {
            method,
            path,
            operation_id,
            summary,
            when: When::Always,
            carries: Carries::Nothing,
            gives: Gives::Nothing,
            deprecates: false,
            query: None,
        }
    }

    const fn before_start(mut self) -> Self {
        self.when = When::BeforeStart;
        self
    }

    const fn after_start(mut self) -> Self {
        self.when = When::AfterStart;
        self
    }

    const fn takes<T: ToSchema>(mut self, example: &'static str) -> Self {
        self.carries = Carries::Value(Described::of::<T>(), example);
        self
    }

    const fn may_take<T: ToSchema>(mut self, example: &'static str) -> Self {
        self.carries = Carries::Optional(Described::of::<T>(), example);
        self
    }

    const fn gives<T: ToSchema>(mut self) -> Self {
        self.gives = Gives::Value(Described::of::<T>());
        self
    }

    const fn gives_text(mut self, media_type: &'static str) -> Self {
        self.gives = Gives::Text(media_type);
        self
    }

    const fn deprecates(mut self) -> Self {
        self.deprecates = true;
        self
    }

    const fn may_ask(mut self, query: Query) -> Self {
        self.query = Some(query);
        self
    }

    const fn refused(mut self) -> Self {
        self.gives = Gives::Refusal;
        self
    }

    /// The types that are needed to understand it.
    fn types(&self) -> impl Iterator<Item = Described> {
        let carried = match self.carries {
            Carries::Value(described, _) | Carries::Optional(described, _) => Some(described),
            Carries::Nothing => None,
        };
        let given = match self.gives {
            Gives::Value(described) => Some(described),
            _ => None,
        };
        carried.into_iter().chain(given)
    }

    fn operation(&self) -> Operation {
        let when = match self.when {
            When::Always => "At any time.",
            When::BeforeStart => "Before the start.",
            When::AfterStart => "After the start.",
        };
        let mut operation = OperationBuilder::new()
            .operation_id(Some(self.operation_id))
            .summary(Some(self.summary))
            .request_body(self.request_body());
        if let Some(id) = self.id() {
            operation = operation.parameter(id);
        }
        if let Some(query) = self.query {
            operation = operation.parameter(query.parameter());
        }
        if let Gives::Refusal = self.gives {
            operation = operation
                .description(Some("Firecracker has this; brume refuses it so far."))
                .extensions(Some(Extensions::from_iter([("x-unsupported", true)])));
        } else {
            operation = operation.description(Some(when));
        }
        if let Some((status, response)) = self.success() {
            operation = operation.response(status, response);
        }
        let endless = matches!(self.gives, Gives::Text("text/event-stream"));
        for (status, name, _) in REFUSALS {
            // The stream of events begins before the rest of the request is looked at.
            if status == "503" || !endless {
                operation = operation.response(status, Ref::from_response_name(name));
            }
        }
        operation.build()
    }

    /// The parameter in the path.
    fn id(&self) -> Option<Parameter> {
        let name = self.path.split_once('{')?.1.trim_end_matches('}');
        let schema = ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^[A-Za-z0-9_]+$"));
        Some(
            ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Path)
                .required(Required::True)
                .description(Some("The same as in the body."))
                .schema(Some(schema))
                .build(),
        )
    }

    fn request_body(&self) -> Option<RequestBody> {
        let (described, example, required) = match self.carries {
            Carries::Nothing => return None,
            Carries::Value(described, example) => (described, example, Required::True),
            Carries::Optional(described, example) => (described, example, Required::False),
        };
        let example: Option<Value> = serde_json::from_str(example).ok();
        let content = ContentBuilder::new()
            .schema(Some(described.reference()))
            .example(example)
            .build();
        Some(
            RequestBodyBuilder::new()
                .content("application/json", content)
                .required(Some(required))
                .build(),
        )
    }

    /// The answer if all is well, and its status.
    fn success(&self) -> Option<(&'static str, Response)> {
        let mut response = ResponseBuilder::new();
        let status = match self.gives {
            Gives::Refusal => return None,
            Gives::Nothing => {
                response = response.description("Done.");
                "204"
            }
            Gives::Value(described) => {
                let content = Content::new(Some(described.reference()));
                response = response
                    .description("The answer.")
                    .content("application/json", content);
                "200"
            }
            Gives::Text(media_type) => {
                let text = ObjectBuilder::new().schema_type(Type::String);
                response = response
                    .description("The answer.")
                    .content(media_type, Content::new(Some(text)));
                "200"
            }
        };
        if self.deprecates {
            let header = Header::new(ObjectBuilder::new().schema_type(Type::String));
            response = response.header("Deprecation", header);
        }
        Some((status, response.build()))
    }
}

impl Query {
    fn parameter(&self) -> Parameter {
        ParameterBuilder::new()
            .name(self.name)
            .parameter_in(ParameterIn::Query)
            .required(Required::False)
            .description(Some(self.description))
            .schema(Some((self.schema)()))
            .build()
    }
}

/// A type that the document describes.
#[derive(Clone, Copy)]
struct Described {
    name: fn() -> Cow<'static, str>,
    schema: fn() -> RefOr<Schema>,
    /// Adds the types it is made of.
    parts: fn(&mut Schemas),
}

impl Described {
    const fn of<T: ToSchema>() -> Self {
        Self {
            name: T::name,
            schema: T::schema,
            parts: T::schemas,
        }
    }

    fn reference(&self) -> Ref {
        Ref::from_schema_name((self.name)())
    }

    fn add_to(&self, schemas: &mut Schemas) {
        schemas.push(((self.name)().into(), (self.schema)()));
        (self.parts)(schemas);
    }
}

/// JSON of any form.
struct AnyJson;

impl PartialSchema for AnyJson {
    fn schema() -> RefOr<Schema> {
        Value::schema()
    }
}

impl ToSchema for AnyJson {}

fn document() -> OpenApi {
    let mut paths = Paths::new();
    for endpoint in &ENDPOINTS {
        let methods = vec![endpoint.method.clone()];
        paths.add_path_operation(endpoint.path, methods, endpoint.operation());
    }
    let license = LicenseBuilder::new()
        .name("Apache-2.0")
        .identifier(Some("Apache-2.0"))
        .build();
    let info = InfoBuilder::new()
        .title("brume")
        .description(Some(
            "The control API of one machine, on its unix socket. It is Firecracker's; operations \
             marked `x-unsupported` are refused so far.",
        ))
        .version(env!("CARGO_PKG_VERSION"))
        .license(Some(license))
        .build();
    OpenApiBuilder::new()
        .info(info)
        .paths(paths)
        .components(Some(components()))
        .build()
}

fn components() -> Components {
    let mut schemas = Schemas::new();
    for described in ENDPOINTS.iter().flat_map(Endpoint::types) {
        described.add_to(&mut schemas);
    }
    let fault = Described::of::<FaultBody<'_>>();
    fault.add_to(&mut schemas);
    Described::of::<Stamped<'_>>().add_to(&mut schemas);
    // Types that are used twice are there twice.
    let schemas: BTreeMap<_, _> = schemas.into_iter().collect();
    let mut components = ComponentsBuilder::new().schemas_from_iter(schemas);
    for (_, name, description) in REFUSALS {
        let response = ResponseBuilder::new()
            .description(description)
            .content("application/json", Content::new(Some(fault.reference())));
        components = components.response(name, response);
    }
    components.build()
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod fuzz;
