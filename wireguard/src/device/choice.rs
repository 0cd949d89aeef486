//! Which WireGuard: the kernel's where there is one, unless told otherwise.

use std::fmt;
use std::str::FromStr;

use super::Mode;

/// What the setting `mode` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Choice {
    /// The kernel's if it has one, else this process.
    #[default]
    Auto,
    /// The kernel's; a kernel without is an error.
    Kernel,
    /// This process.
    User,
}

impl Choice {
    /// The mode to run in on this machine.
    ///
    /// # Errors
    /// If the kernel's is asked for and there is none.
    pub fn mode(self) -> Result<Mode, NoKernelWireGuard> {
        match self {
            Self::User => Ok(Mode::User),
            Self::Auto if !kernel_has_wireguard() => Ok(Mode::User),
            Self::Kernel if !kernel_has_wireguard() => Err(NoKernelWireGuard),
            Self::Auto | Self::Kernel => Ok(Mode::Kernel),
        }
    }
}

impl FromStr for Choice {
    type Err = InvalidChoice;

    fn from_str(text: &str) -> Result<Self, InvalidChoice> {
        match text {
            "auto" => Ok(Self::Auto),
            "kernel" => Ok(Self::Kernel),
            "user" => Ok(Self::User),
            _ => Err(InvalidChoice(text.to_owned())),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kernel => "kernel",
            Self::User => "user",
        })
    }
}

/// A word that is no [`Choice`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tunnel's mode is auto, kernel or user, not {0:?}")]
pub struct InvalidChoice(String);

/// The kernel's WireGuard was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this kernel has no WireGuard (modprobe wireguard says why), and the tunnel's mode is kernel: load the module, or set the mode to auto or user"
)]
pub struct NoKernelWireGuard;

/// Whether the kernel has WireGuard. Asking loads its module where it is one, given the right to.
pub fn kernel_has_wireguard() -> bool {
    wireguard_uapi::WgSocket::connect().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_read_as_it_is_written() {
        for choice in [Choice::Auto, Choice::Kernel, Choice::User] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!("fast".parse::<Choice>(), Err(InvalidChoice("fast".to_owned())));
    }

    #[test]
    fn auto_is_the_kernels_where_there_is_one() {
        let expected = if kernel_has_wireguard() { Mode::Kernel } else { Mode::User };
        assert_eq!(Choice::Auto.mode(), Ok(expected));
        assert_eq!(Choice::User.mode(), Ok(Mode::User));
    }
}
