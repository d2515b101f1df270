//! The paths of larder's own pages for registries: what is accepted stays itself in a URL, and names
//! survive printing.

#![no_main]

use larder::terraform::own::{
    ArchiveName, Page, RegistryPage, is_part, is_version, mirror_page, registry_page,
};
use libfuzzer_sys::fuzz_target;
use url::Url;

fuzz_target!(|path: &str| {
    if let Some((host, RegistryPage::Service { rest, kind, .. })) = registry_page(path) {
        assert!(path.contains(&rest), "{path}");
        if kind.is_some() {
            // All of it is plain: it means the same to whoever reads it.
            let url = Url::parse(&format!("https://{host}/x/{rest}")).expect("a path makes a URL");
            assert_eq!(url.path(), format!("/x/{rest}"));
            assert!(url.query().is_none() && url.fragment().is_none());
        }
    }
    if let Some(page) = mirror_page(path) {
        assert!(is_part(&page.namespace) && is_part(&page.name));
        match page.page {
            Page::Index => {}
            Page::Version(version) => assert!(is_version(&version)),
            Page::Archive { version, os, arch } => {
                let name = ArchiveName {
                    name: page.name,
                    version,
                    os,
                    arch,
                };
                assert_eq!(ArchiveName::parse(&name.to_string()), Some(name));
            }
        }
    }
});
