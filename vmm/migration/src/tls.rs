// SPDX-License-Identifier: Apache-2.0
//! TLS: who may move a machine here, and that nobody reads or changes it on its way.
//!
//! TLS 1.3 only (RFC 8446). Both sides show a certificate that the same authority has signed. In
//! this version of TLS a client is done before the server has judged its certificate, so the server
//! sends one byte of data after the handshake: whoever is turned away learns it, and why, from the
//! handshake and not from the first message.

use std::fmt::{self, Debug, Formatter};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, InconsistentKeys, RootCertStore, ServerConfig,
};
use thiserror::Error;

use crate::address::Address;

mod secured;

pub(crate) use secured::Secured;

/// What is spoken inside, for servers of several protocols.
const PROTOCOL_NAME: &[u8] = b"brume-migration";

/// The files that TLS needs, each in PEM form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that the other side's certificate may be signed by.
    pub ca: PathBuf,
    /// Our certificate, then those between it and the authority, if there are any.
    pub certificate: PathBuf,
    /// The private key of our certificate.
    pub key: PathBuf,
    /// The name that a server's certificate is to be for, if that is not the host that is
    /// connected to.
    pub server_name: Option<String>,
}

/// TLS that cannot be had.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is damaged.
    #[error("{} is not in PEM form", .path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// A file does not have in it what it should.
    #[error("there is no {what} in {} (PEM form is needed)", .path.display())]
    Empty {
        /// Which.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// Something in a file cannot be used.
    #[error("{} cannot be used", .path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// A key of something else.
    #[error("{} is not the private key of the certificate in {}", .key.display(), .certificate.display())]
    Mismatch {
        /// The file of the key.
        key: PathBuf,
        /// The file of the certificate.
        certificate: PathBuf,
    },
    /// No certificate can be for this name.
    #[error("\"{0}\" is no name or address that a certificate could be for")]
    Name(String),
    /// The library does not work as it is set up here.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    /// There is TLS already.
    #[error("the connection is secured already")]
    Twice,
    /// The other side is not who it should be.
    #[error("the other side's certificate is not accepted: {0}")]
    Certificate(String),
    /// The other side has shown no certificate.
    #[error("the other side has no certificate: it needs one that our authority has signed")]
    NoCertificate,
    /// The other side does not want us.
    #[error("the other side does not accept us: {0}")]
    Refused(String),
    /// The other side does not speak TLS.
    #[error("the other side does not speak TLS: both sides need it, or neither")]
    NotTls,
    /// The other side does something else than it should.
    #[error("the TLS handshake has failed")]
    Handshake(#[source] rustls::Error),
    /// The other side is too slow.
    #[error("the other side has not done its part of the TLS handshake in time")]
    TimedOut,
    /// The other side has gone.
    #[error("the other side has closed the connection in the TLS handshake: does it speak TLS?")]
    Ended,
    /// The socket cannot be used.
    #[error("the connection broke in the TLS handshake")]
    Socket(#[source] io::Error),
}

impl TlsError {
    /// What an error of a socket means in a handshake.
    fn of_socket(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => Self::Ended,
            _ => Self::Socket(error),
        }
    }

    /// What an error of the protocol means in a handshake.
    fn of_protocol(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => Self::Certificate(reason(&error)),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::AlertReceived(alert) => Self::Refused(told(alert)),
            rustls::Error::InvalidMessage(
                rustls::InvalidMessage::InvalidContentType
                | rustls::InvalidMessage::UnknownProtocolVersion
                | rustls::InvalidMessage::MessageTooLarge
                | rustls::InvalidMessage::InvalidEmptyPayload,
            ) => Self::NotTls,
            error => Self::Handshake(error),
        }
    }
}

/// Why a certificate is not accepted.
fn reason(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet (are both clocks right?)".into()
        }
        // A bad one is of an authority that has the name of ours and another key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "our authority has not signed it".into()
        }
        CertificateError::NotValidForNameContext { expected, .. } => {
            format!("it is not for the name \"{}\"", expected.to_str())
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is for another purpose (a source's is for a client, a target's for a server)".into()
        }
        other => other.to_string(),
    }
}

/// What the other side means by an alert (RFC 8446, 6.2).
fn told(alert: AlertDescription) -> String {
    let text = match alert {
        AlertDescription::UnknownCA => "its authority has not signed our certificate",
        AlertDescription::DecryptError => {
            "a signature of ours does not fit: is our certificate one of its authority?"
        }
        AlertDescription::CertificateExpired => {
            "our certificate has expired, or is not valid yet there"
        }
        AlertDescription::CertificateRequired => "it wants a certificate",
        AlertDescription::BadCertificate => {
            "our certificate is damaged, or is not for the name by which it knows us"
        }
        AlertDescription::UnsupportedCertificate => "our certificate is for another purpose",
        AlertDescription::ProtocolVersion => "it does not speak TLS 1.3",
        AlertDescription::NoApplicationProtocol => "it does not speak brume's migration protocol",
        _ => return format!("it has said {alert:?}"),
    };
    text.into()
}

/// Keys and certificates, read and ready.
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    server_name: Option<ServerName<'static>>,
}

impl Debug for Tls {
    // Nothing of a key gets into a log.
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tls")
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// One of them cannot be used, or they do not fit together.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let roots = Arc::new(authorities(&files.ca)?);
        let chain = certificates(&files.certificate)?;
        let key = private_key(&files.key)?;
        let unfit = |error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::Mismatch {
                key: files.key.clone(),
                certificate: files.certificate.clone(),
            },
            rustls::Error::InvalidCertificate(_) => unusable(&files.certificate, error),
            error => unusable(&files.key, error),
        };
        let provider = Arc::new(ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![PROTOCOL_NAME.into()];
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(TlsError::Setup)?
            .with_client_cert_verifier(client_verifier(roots, provider, &files.ca)?)
            .with_single_cert(chain, key)
            .map_err(unfit)?;
        // A ticket that a client has not read when it closes would be answered with a reset, which
        // takes away what the client has sent last.
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![PROTOCOL_NAME.into()];
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            server_name: files.server_name.as_deref().map(name).transpose()?,
        })
    }

    /// The name that the server at `address` is to have a certificate for.
    fn server_name(&self, address: &Address) -> Result<ServerName<'static>, TlsError> {
        match (&self.server_name, address) {
            (Some(name), _) => Ok(name.clone()),
            (None, Address::Tcp { host, .. }) => name(host),
            (None, Address::Unix(_) | Address::Fd(_)) => name("localhost"),
        }
    }
}

fn name(text: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(text.to_owned()).map_err(|_| TlsError::Name(text.into()))
}

fn unusable(path: &Path, source: rustls::Error) -> TlsError {
    TlsError::Unusable {
        path: path.into(),
        source,
    }
}

fn client_verifier(
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    path: &Path,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .map_err(|error| unusable(path, rustls::Error::General(error.to_string())))
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| unusable(path, source))?;
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(TlsError::Empty {
            path: path.into(),
            what: "certificate",
        }),
        found => found.map_err(|source| not_pem(path, source)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Empty {
            path: path.into(),
            what: "private key",
        },
        source => not_pem(path, source),
    })
}

fn not_pem(path: &Path, source: pem::Error) -> TlsError {
    TlsError::Pem {
        path: path.into(),
        source,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
pub(crate) mod tests;
