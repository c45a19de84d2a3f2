//! Output for people: terminal, progress, summary, plot.

pub mod collapse;
pub mod console;
pub mod live;
pub mod live_plot;
pub mod pace;
pub mod plot;
pub mod progress;
pub mod reached;
pub mod rows;
pub mod summary;
