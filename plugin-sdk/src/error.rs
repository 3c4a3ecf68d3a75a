use std::fmt;

/// What `apply` returns: nothing, or why the event cannot be applied.
///
/// The defaults make `Result` and `Result<()>` the same type, and leave `Result<T, E>` usable as ever.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

/// Why an event cannot be applied, as a sentence for the operator.
///
/// Every [`std::error::Error`] turns into one with `?`, together with its causes. For errors of your own there are
/// [`Error::msg`], [`bail!`](crate::bail) and [`ensure!`](crate::ensure). Write messages in lower case and without a
/// full stop: the host puts the event's source, position and type around them.
///
/// Like `anyhow::Error` it does not implement [`std::error::Error`] itself; otherwise the blanket conversion could not
/// exist.
pub struct Error(Box<str>);

impl Error {
    /// An error with this message.
    pub fn msg(message: impl fmt::Display) -> Self {
        Self(message.to_string().into())
    }

    /// The same error, with what was being done put in front of it.
    pub(crate) fn within(self, what: impl fmt::Display) -> Self {
        Self::msg(format_args!("{what}: {}", self.0))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// `unwrap` in a test prints this: the sentence is worth more than the structure.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Error {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Some errors print their cause themselves; saying it twice helps nobody.
            if !message.contains(&cause_text) {
                message.push_str(": ");
                message.push_str(&cause_text);
            }
            source = cause.source();
        }
        Self(message.into())
    }
}

/// A value in a message: its first characters, if it is long. What is refused may be a megabyte of text.
pub(crate) fn quoted(text: &str) -> impl fmt::Display {
    const CHARS: usize = 80;
    fmt::from_fn(move |f| match text.char_indices().nth(CHARS) {
        Some((end, _)) => write!(f, "{}…", &text[..end]),
        None => f.write_str(text),
    })
}

/// Returns an [`Error`] with a formatted message from the function around it.
///
/// ```
/// use shadowbox_plugin::prelude::*;
///
/// fn quantity(n: i64) -> Result<()> {
///     if n < 1 {
///         bail!("quantity is {n}, and must be 1 or more");
///     }
///     Ok(())
/// }
/// assert_eq!(quantity(0).unwrap_err().to_string(), "quantity is 0, and must be 1 or more");
/// ```
#[macro_export]
macro_rules! bail {
    ($($message:tt)+) => {
        return ::core::result::Result::Err($crate::Error::msg(::core::format_args!($($message)+)))
    };
}

/// Returns an [`Error`] with a formatted message unless the condition holds.
///
/// ```
/// use shadowbox_plugin::prelude::*;
///
/// fn quantity(n: i64) -> Result<()> {
///     ensure!(n >= 1, "quantity is {n}, and must be 1 or more");
///     Ok(())
/// }
/// assert!(quantity(0).is_err() && quantity(1).is_ok());
/// ```
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            $crate::bail!($($message)+);
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(std::num::ParseIntError);
    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bad number")
        }
    }
    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn an_error_carries_its_causes_once() {
        let error = Error::from(Outer("x".parse::<i64>().unwrap_err()));
        assert_eq!(error.to_string(), "bad number: invalid digit found in string");
    }
}
