// SPDX-License-Identifier: Apache-2.0
//! How the source finds its target, the first time and again.

use std::time::Duration;

use brume_api::{Fault, MigrationCompression, MigrationTls, SendMigration};
use brume_migration::{Address, Channel, Choice, Link, Purpose, Session, Tls, TlsFiles};

use super::error::SourceError;

/// The way to a target.
#[derive(Clone)]
pub(crate) struct Route {
    pub(crate) address: Address,
    tls: Option<Tls>,
    compression: Choice,
    pub(super) session: Session,
}

impl Route {
    /// The way that `request` names.
    ///
    /// # Errors
    ///
    /// It is no address, or its certificates cannot be used.
    pub(crate) fn of(request: &SendMigration) -> Result<Self, Fault> {
        let address = request
            .destination
            .parse()
            .map_err(|error| Fault::from_error(&error))?;
        Ok(Self {
            address,
            tls: load(request.tls.as_ref())?,
            compression: match request.compression {
                MigrationCompression::Auto => Choice::Auto,
                MigrationCompression::None => Choice::None,
                MigrationCompression::Lz4 => Choice::Lz4,
                MigrationCompression::Zstd => Choice::Zstd,
            },
            session: Session::new().map_err(|error| Fault::from_error(&error))?,
        })
    }

    /// Makes a connection, on which nothing has been said yet.
    ///
    /// # Errors
    ///
    /// Nobody is there, or it is somebody else.
    pub(super) fn open(&self, limit: Duration) -> Result<Channel, SourceError> {
        let mut link = Link::connect(&self.address, limit)?;
        link.set_limit(limit)
            .map_err(brume_migration::LinkError::from)?;
        if let Some(tls) = &self.tls {
            link = link.secured_as_client(tls, &self.address)?;
        }
        let mut channel = Channel::new(link);
        channel.set_compression(self.compression);
        Ok(channel)
    }

    /// Comes back to a target that was lost.
    ///
    /// # Errors
    ///
    /// It is not there, or knows nothing of it.
    pub(super) fn come_back(&self, limit: Duration) -> Result<Channel, SourceError> {
        let mut channel = self.open(limit)?;
        channel.greet(&self.session, Purpose::Return)?;
        Ok(channel)
    }
}

/// Loads the certificates that a client has named.
///
/// # Errors
///
/// They cannot be used.
pub(crate) fn load(tls: Option<&MigrationTls>) -> Result<Option<Tls>, Fault> {
    let files = tls.map(|tls| TlsFiles {
        ca: tls.ca.clone(),
        certificate: tls.certificate.clone(),
        key: tls.key.clone(),
        server_name: tls.server_name.clone(),
    });
    let loaded = files.as_ref().map(Tls::load).transpose();
    loaded.map_err(|error| Fault::from_error(&error))
}
