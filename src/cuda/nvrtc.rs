//! NVRTC, the compiler of every CUDA build of torch: CUDA C++ to machine code in this process.

use super::bindings;
use crate::tensor::CudaFailure as Failure;
use libloading::Library;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::path::Path;
use std::ptr::null_mut;

type Handle = *mut c_void;

bindings! {
    Api, "NVRTC" {
        version = "nvrtcVersion"(major: *mut c_int, minor: *mut c_int),
        error_string = "nvrtcGetErrorString"(code: c_int) -> *const c_char,
        number_of_archs = "nvrtcGetNumSupportedArchs"(count: *mut c_int),
        archs = "nvrtcGetSupportedArchs"(archs: *mut c_int),
        create = "nvrtcCreateProgram"(
            program: *mut Handle, source: *const c_char, name: *const c_char,
            headers: c_int, texts: *const *const c_char, names: *const *const c_char
        ),
        destroy = "nvrtcDestroyProgram"(program: *mut Handle),
        compile = "nvrtcCompileProgram"(
            program: Handle, options: c_int, texts: *const *const c_char
        ),
        log_size = "nvrtcGetProgramLogSize"(program: Handle, size: *mut usize),
        log = "nvrtcGetProgramLog"(program: Handle, text: *mut c_char),
        cubin_size = "nvrtcGetCUBINSize"(program: Handle, size: *mut usize),
        cubin = "nvrtcGetCUBIN"(program: Handle, image: *mut c_char),
        ptx_size = "nvrtcGetPTXSize"(program: Handle, size: *mut usize),
        ptx = "nvrtcGetPTX"(program: Handle, text: *mut c_char),
    }
}

type Result<T> = std::result::Result<T, Failure>;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Read = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;

/// The compiler, its version and its architectures.
pub(crate) struct Nvrtc {
    api: Api,
    version: (i32, i32),
    archs: Vec<u32>,
}

/// What to compile for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Machine code for this architecture, which runs on it and on later ones of its generation.
    Cubin(u32),
    /// PTX for this architecture, for a generation that is newer than this NVRTC.
    Ptx(u32),
}

impl Target {
    /// The option's value; also a part of the cache's key.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Cubin(arch) => format!("sm_{arch}"),
            Self::Ptx(arch) => format!("compute_{arch}"),
        }
    }
}

/// A translation unit: the file, its headers by name, the options beside the architecture.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program<'a> {
    /// Its name in the compiler's messages.
    pub name: &'a str,
    pub text: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    /// As on the command line.
    pub options: &'a [&'a str],
}

impl Nvrtc {
    pub(crate) fn open(names: impl Iterator<Item = String>) -> Result<Self> {
        let names = names.inspect(|name| open_builtins(Path::new(name)));
        let mut nvrtc = Self { api: Api::open(names)?, version: (0, 0), archs: Vec::new() };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: `Api` holds the functions with the signatures of their header, here and below.
        nvrtc.check("nvrtcVersion", unsafe { (nvrtc.api.version)(&mut major, &mut minor) })?;
        // SAFETY: a place for one int.
        nvrtc.check("nvrtcGetNumSupportedArchs", unsafe {
            (nvrtc.api.number_of_archs)(&mut count)
        })?;
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the number of places that NVRTC returned.
        nvrtc.check("nvrtcGetSupportedArchs", unsafe { (nvrtc.api.archs)(archs.as_mut_ptr()) })?;
        nvrtc.archs = archs.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect();
        nvrtc.version = (major, minor);
        Ok(nvrtc)
    }

    /// (major, minor)
    pub(crate) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// What to compile for a device of this compute capability (90 for 9.0).
    pub(crate) fn target(&self, capability: u32) -> Result<Target> {
        target(&self.archs, capability)
            .ok_or(Failure::UnknownArch { version: self.version, capability })
    }

    /// Machine code, or PTX.
    pub(crate) fn compile(&self, program: Program, target: Target) -> Result<Vec<u8>> {
        let mut handle = self.create(program)?;
        let image = self.image(handle, program, target);
        // SAFETY: the program that `create` returned, for the last time.
        unsafe { (self.api.destroy)(&mut handle) };
        image
    }

    fn create(&self, program: Program) -> Result<Handle> {
        let (text, name) = (terminated(program.text), terminated(program.name));
        let headers = program.headers.iter();
        let (names, texts): (Vec<_>, Vec<_>) =
            headers.map(|(name, text)| (terminated(name), terminated(text))).unzip();
        let (names, texts, mut handle) = (pointers(&names), pointers(&texts), null_mut());
        let create = self.api.create;
        // SAFETY: zero-terminated strings, whose number is passed; NVRTC copies them.
        let code = unsafe {
            let count = names.len() as c_int;
            create(&mut handle, text.as_ptr(), name.as_ptr(), count, texts.as_ptr(), names.as_ptr())
        };
        self.check("nvrtcCreateProgram", code).map(|()| handle)
    }

    fn image(&self, handle: Handle, program: Program, target: Target) -> Result<Vec<u8>> {
        let arch = format!("--gpu-architecture={}", target.name());
        let options = program.options.iter().copied().chain([arch.as_str()]);
        let options: Vec<CString> = options.map(terminated).collect();
        let options = pointers(&options);
        // SAFETY: a live program; zero-terminated strings, whose number is passed.
        let code = unsafe { (self.api.compile)(handle, options.len() as c_int, options.as_ptr()) };
        if let Err(Failure::Nvrtc { reason, .. }) = self.check("nvrtcCompileProgram", code) {
            let log = self.read(handle, "nvrtcGetProgramLog", self.api.log_size, self.api.log);
            let log = String::from_utf8_lossy(&log.unwrap_or_default())
                .trim_end_matches(['\0', '\n'])
                .to_owned();
            let (name, arch) = (program.name.to_owned(), target.name());
            return Err(Failure::Compile { version: self.version, name, arch, reason, log });
        }
        match target {
            Target::Cubin(_) => {
                self.read(handle, "nvrtcGetCUBIN", self.api.cubin_size, self.api.cubin)
            }
            Target::Ptx(_) => self.read(handle, "nvrtcGetPTX", self.api.ptx_size, self.api.ptx),
        }
    }

    fn read(&self, handle: Handle, call: &'static str, size: Size, read: Read) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: a live program, and a place for its size.
        self.check(call, unsafe { size(handle, &mut bytes) })?;
        let mut image = vec![0u8; bytes];
        // SAFETY: the number of bytes that NVRTC returned.
        self.check(call, unsafe { read(handle, image.as_mut_ptr().cast()) })?;
        Ok(image)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a constant string, for every code.
        let reason =
            unsafe { CStr::from_ptr((self.api.error_string)(code)) }.to_string_lossy().into_owned();
        Err(Failure::Nvrtc { call, reason })
    }
}

/// Opens NVRTC's builtins library, which NVRTC itself does not find in a wheel's folder.
fn open_builtins(nvrtc: &Path) {
    let Some(files) = nvrtc.parent().and_then(|folder| folder.read_dir().ok()) else { return };
    for file in files
        .flatten()
        .filter(|file| file.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so"))
    {
        // SAFETY: NVIDIA's libraries may be loaded at any time. It stays open.
        if let Ok(library) = unsafe { Library::new(file.path()) } {
            std::mem::forget(library);
        }
    }
}

/// Architectures of embedded devices.
const TEGRA: [u32; 4] = [72, 87, 101, 110];

/// The newest architecture of the device's own generation that does not go beyond it; else PTX of
/// the newest one before it.
///
/// Machine code for a Tegra runs on it alone, and it runs no other.
fn target(archs: &[u32], capability: u32) -> Option<Target> {
    let fits = |arch: &&u32| **arch <= capability;
    let related = |arch: &&u32| {
        let tegra = TEGRA.contains(*arch) || TEGRA.contains(&capability);
        if tegra {
            **arch == capability
        } else {
            **arch / 10 == capability / 10
        }
    };
    let own = archs.iter().filter(fits).filter(related).max();
    own.map(|arch| Target::Cubin(*arch))
        .or_else(|| archs.iter().filter(fits).max().map(|arch| Target::Ptx(*arch)))
}

/// The sources and options hold no zero byte; a text would end there.
fn terminated(text: &str) -> CString {
    CString::new(text.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_the_newest_that_runs_on_the_device() {
        let archs = [75, 80, 86, 89, 90, 100, 103, 120, 121];
        for (capability, expected) in [
            (75, Some(Target::Cubin(75))),
            (87, Some(Target::Ptx(86))), // a Tegra
            (88, Some(Target::Cubin(86))),
            (90, Some(Target::Cubin(90))),
            (122, Some(Target::Cubin(121))),
            (110, Some(Target::Ptx(103))), // a generation of its own
            (130, Some(Target::Ptx(121))),
            (70, None), // older than the oldest
        ] {
            assert_eq!(target(&archs, capability), expected, "{capability}");
        }
        assert_eq!(target(&[90, 100, 101], 103), Some(Target::Cubin(100)));
    }
}
