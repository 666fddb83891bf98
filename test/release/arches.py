"""The architectures, and the binary of each: build/cross/NAME/lkjwt.

x86_64 is ./lkjwt itself, by musl-gcc; zig, which carries musl, builds the
others from the same Makefile, each in a folder of its own.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess

TOP = pathlib.Path(__file__).resolve().parents[2]
CROSS = TOP / "build" / "cross"
# What is downloaded stays in .deps, and so does what zig makes of it.
RELEASE = TOP / ".deps" / "release"


@dataclasses.dataclass(frozen=True)
class Arch:
    name: str
    machine: str            # as readelf -h names it
    platform: str           # as images name it; "" is not shipped
    target: str             # zig's; "" is this machine's
    qemu: str
    bits: int = 64


ARCHES = (
    Arch("x86_64", "Advanced Micro Devices X86-64", "linux/amd64", "", ""),
    Arch("aarch64", "AArch64", "linux/arm64", "aarch64-linux-musl",
         "qemu-aarch64-static"),
    Arch("armv7", "ARM", "linux/arm/v7", "arm-linux-musleabihf",
         "qemu-arm-static", 32),
    Arch("riscv64", "RISC-V", "", "riscv64-linux-musl",
         "qemu-riscv64-static"),
    Arch("i386", "Intel 80386", "", "x86-linux-musl", "qemu-i386-static",
         32),
)
SHIPPED = tuple(arch for arch in ARCHES if arch.platform)


def zig():
    return next(RELEASE.glob("lib/python3*/site-packages/ziglang/zig"))


def compiler(arch):
    return [str(zig()), "cc", "-target", arch.target]


def environ(folder):
    """What was made in one folder must not be taken for another's."""
    env = {key: value for key, value in os.environ.items()
           if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CC", "AR",
                          "STRIP", "STAGE1", "BEARSSL")}
    return dict(env, ZIG_GLOBAL_CACHE_DIR=str(RELEASE / "zig-cache"),
                ZIG_LOCAL_CACHE_DIR=str(folder / "build" / "zig-cache"))


def make(arch, folder):
    """Builds lkjwt in a folder of that name, which may hold an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("Makefile", "lkjwt.c"):
        shutil.copy2(TOP / file, folder / file)  # with its time, for make
    link = folder / ".deps"
    if not link.is_symlink():
        link.symlink_to(TOP / ".deps")
    words = ["make", "-s", "all", f"STAGE1={TOP / 'lkjwt'}"]
    if arch.target:
        words += ["CC=" + " ".join(compiler(arch)), "AR=llvm-ar",
                  "STRIP=llvm-strip"]
    done = subprocess.run(words, cwd=folder, env=environ(folder), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{arch.name}: {done.stdout[-2000:]}")
    return folder / "lkjwt"


def folder_of(arch):
    return CROSS / arch.name if arch.target else TOP


def binary(arch):
    """The binary of that architecture, built where it is missing or old."""
    return make(arch, CROSS / arch.name) if arch.target else TOP / "lkjwt"


def emulator(arch):
    """The words before a program of that architecture."""
    if not arch.qemu:
        return []
    if arch.name == "i386":  # most kernels for x86_64 run it themselves
        try:
            subprocess.run([folder_of(arch) / "lkjwt", "--version"],
                           check=True, stdout=subprocess.DEVNULL)
            return []
        except (OSError, subprocess.CalledProcessError):
            pass
    return [shutil.which(arch.qemu)]
