//! What goes wrong around larder: its process is killed, its disk fills or is read-only, its clock
//! jumps, upstream stalls, clients hang. Nobody else pays for it.

mod clock;
mod crowd;
mod disk;
mod kill;
mod stall;
