//! Compiled kernels on disk, so that a later process does not compile them again.
//!
//! One file for each image: a line with key, length and digest, then the image. Files appear whole
//! (written to a temporary file, then renamed), so several processes may write. A file that is
//! cut off, altered or of another key counts as absent and is written anew; a folder that cannot be
//! read or written only costs the time of compiling.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where images are kept: `SOKD_CACHE_DIR`, else `sokd` in the user's cache folder. `None`: nowhere
/// (`SOKD_CACHE_DIR` is empty, or there is no home). Read on every call: a test or a script may
/// change its environment.
pub(crate) fn folder() -> Option<PathBuf> {
    let given = |name: &str| env::var_os(name).map(PathBuf::from);
    if let Some(own) = given("SOKD_CACHE_DIR") {
        return (!own.as_os_str().is_empty()).then_some(own);
    }
    // The XDG rule: a relative path is to be ignored.
    let user = given("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let local = || {
        given(if cfg!(windows) { "LOCALAPPDATA" } else { "HOME" }).filter(|path| path.is_absolute())
    };
    let home = || local().map(|path| if cfg!(windows) { path } else { path.join(".cache") });
    user.or_else(home).map(|path| path.join("sokd"))
}

/// The sources and options of an image, as a digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// A readable part of the file name: `masked_mse-sm_90`.
    label: String,
    digest: u128,
}

impl Key {
    /// `parts` is all that can change the image; their borders count.
    pub(crate) fn new<'a>(label: String, parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut digest = Digest::default();
        for part in parts {
            digest.eat(&(part.len() as u64).to_le_bytes());
            digest.eat(part.as_bytes());
        }
        Self { label, digest: digest.0 }
    }

    /// The file's name.
    pub(crate) fn file(&self) -> String {
        format!("{}-{:032x}.cubin", self.label, self.digest)
    }

    /// The file's first line.
    fn head(&self, image: &[u8]) -> String {
        let mut digest = Digest::default();
        digest.eat(image);
        format!("sokd {:032x} {} {:032x}\n", self.digest, image.len(), digest.0)
    }
}

/// FNV-1a of 128 bits: against accidents, not forgery, which would need the user's own rights.
struct Digest(u128);

impl Default for Digest {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Digest {
    fn eat(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u128::from(*byte))
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

/// The image of this key, where the folder has it whole.
pub(crate) fn load(folder: &Path, key: &Key) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    File::open(folder.join(key.file())).ok()?.read_to_end(&mut whole).ok()?;
    let border = whole.iter().position(|byte| *byte == b'\n')? + 1;
    let image = whole.split_off(border);
    (whole == key.head(&image).as_bytes()).then_some(image)
}

/// Keeps an image. An error means that the next process compiles again.
pub(crate) fn store(folder: &Path, key: &Key, image: &[u8]) -> io::Result<()> {
    make(folder)?;
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let beside = folder.join(format!(".{}.{}.{count}", key.file(), process::id()));
    let written =
        write(&beside, key, image).and_then(|()| fs::rename(&beside, folder.join(key.file())));
    if written.is_err() {
        let _ = fs::remove_file(&beside); // it may not exist
    }
    written
}

fn write(path: &Path, key: &Key, image: &[u8]) -> io::Result<()> {
    // A leftover of an earlier process of the same id is overwritten.
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(key.head(image).as_bytes())?;
    file.write_all(image)
}

/// Creates the folder, readable by its owner alone: it holds code.
fn make(folder: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A separate folder for each test, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = env::temp_dir().join(format!("sokd-cache-{name}-{}", process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn key(source: &str) -> Key {
        Key::new("refine-sm_90".into(), [source, "-O3"])
    }

    #[test]
    fn what_is_stored_is_loaded_and_nothing_else_is() {
        let folder = Scratch::new("stored");
        assert_eq!(load(&folder.0, &key("a")), None);
        store(&folder.0, &key("a"), b"image\n\0with a line").unwrap();
        assert_eq!(load(&folder.0, &key("a")).unwrap(), b"image\n\0with a line");
        assert_eq!(load(&folder.0, &key("b")), None);
        store(&folder.0, &key("b"), b"").unwrap();
        assert_eq!(load(&folder.0, &key("b")).unwrap(), b"");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn the_borders_between_parts_count() {
        let joined = |parts: [&'static str; 2]| Key::new(String::new(), parts);
        assert_ne!(joined(["ab", "c"]), joined(["a", "bc"]));
        assert_eq!(joined(["ab", "c"]), joined(["ab", "c"]));
    }

    #[test]
    fn every_altered_file_counts_as_absent() {
        let folder = Scratch::new("altered");
        store(&folder.0, &key("a"), b"the image").unwrap();
        let path = folder.0.join(key("a").file());
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(load(&folder.0, &key("a")), None, "cut at {length}");
        }
        for place in 0..whole.len() {
            let mut altered = whole.clone();
            altered[place] ^= 0x20;
            fs::write(&path, &altered).unwrap();
            assert_eq!(load(&folder.0, &key("a")), None, "altered at {place}");
        }
        fs::write(&path, [whole.as_slice(), b"more"].concat()).unwrap();
        assert_eq!(load(&folder.0, &key("a")), None, "longer");
        store(&folder.0, &key("a"), b"the image").unwrap();
        assert_eq!(load(&folder.0, &key("a")).unwrap(), b"the image", "written anew");
    }

    #[test]
    fn another_keys_file_in_the_place_counts_as_absent() {
        let folder = Scratch::new("swapped");
        store(&folder.0, &key("a"), b"the image").unwrap();
        fs::rename(folder.0.join(key("a").file()), folder.0.join(key("b").file())).unwrap();
        assert_eq!(load(&folder.0, &key("b")), None);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_to_be_ignored() {
        let folder = Scratch::new("file");
        fs::write(&folder.0, "a file where the folder should be").unwrap();
        assert!(store(&folder.0, &key("a"), b"image").is_err());
        assert_eq!(load(&folder.0, &key("a")), None);
        let _ = fs::remove_file(&folder.0);
    }

    #[test]
    fn writers_and_readers_at_once_see_whole_files() {
        let folder = Scratch::new("at-once");
        let image = vec![7u8; 1 << 16];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20).for_each(|_| store(&folder.0, &key("a"), &image).unwrap()));
                scope.spawn(|| {
                    let found = (0..20).filter_map(|_| load(&folder.0, &key("a")));
                    found.for_each(|found| assert_eq!(found, image));
                });
            }
        });
        assert_eq!(load(&folder.0, &key("a")).unwrap(), image);
    }
}
