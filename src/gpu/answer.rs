//! Whether a buffer was made, where the device says so after the call that asked for it has returned: in a browser.

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use native::Answer;
#[cfg(target_arch = "wasm32")]
pub(crate) use web::Answer;

/// Elsewhere the call itself returns the error, so a buffer that is there was made.
#[cfg(not(target_arch = "wasm32"))]
mod native {
    use crate::error::Result;

    #[derive(Clone, Debug)]
    pub(crate) struct Answer;

    impl Answer {
        #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "as in a browser")]
        pub(crate) fn check(&self) -> Result<()> {
            Ok(())
        }

        #[expect(clippy::unused_async, reason = "as in a browser")]
        pub(crate) async fn arrive(&self) -> Result<()> {
            Ok(())
        }
    }
}

#[cfg(target_arch = "wasm32")]
mod web {
    use std::cell::RefCell;
    use std::fmt::{self, Debug, Formatter};
    use std::future::{Future, poll_fn};
    use std::pin::Pin;
    use std::rc::Rc;
    use std::task::{Context, Poll, Waker};

    use crate::error::{BrowserError, Result};

    type Scope = Pin<Box<dyn Future<Output = Option<wgpu::Error>>>>;

    /// The answer of a buffer's error scopes. A scope's promise resolves whether or not anybody polls it, so a later
    /// call learns of it without waiting.
    #[derive(Clone)]
    pub(crate) struct Answer(Rc<RefCell<State>>);

    struct State {
        label: String,
        bytes: u64,
        /// Those that have not answered.
        scopes: Vec<Scope>,
        /// What the first error said.
        refused: Option<String>,
    }

    impl Answer {
        /// The answer of error scopes that were popped.
        pub(crate) fn new(label: &str, bytes: u64, scopes: Vec<Scope>) -> Self {
            let label = label.to_owned();
            Self(Rc::new(RefCell::new(State { label, bytes, scopes, refused: None })))
        }

        /// Returns an error if it is known that the buffer was refused.
        pub(crate) fn check(&self) -> Result<()> {
            let _ = self.poll(&mut Context::from_waker(Waker::noop()));
            self.outcome()
        }

        /// Completes when it is known whether the buffer was made.
        pub(crate) async fn arrive(&self) -> Result<()> {
            poll_fn(|context| self.poll(context)).await;
            self.outcome()
        }

        fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
            let State { scopes, refused, .. } = &mut *self.0.borrow_mut();
            scopes.retain_mut(|scope| match scope.as_mut().poll(context) {
                Poll::Pending => true,
                Poll::Ready(error) => {
                    *refused = refused.take().or(error.map(|error| error.to_string()));
                    false
                }
            });
            if scopes.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        }

        fn outcome(&self) -> Result<()> {
            let State { label, bytes, refused, .. } = &*self.0.borrow();
            let Some(reason) = refused else { return Ok(()) };
            let (label, reason) = (label.clone(), reason.as_str().into());
            Err(BrowserError::MemoryRefused { label, bytes: *bytes, reason }.into())
        }
    }

    impl Debug for Answer {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            f.debug_struct("Answer").field("label", &self.0.borrow().label).finish_non_exhaustive()
        }
    }
}
