//! What is the same for every peer: numbers by which our routes and rules are known, and what goes where.

use serde::{Deserialize, Serialize};

/// Our number in the `protocol` field of routes and rules (`rtm_protocol`, `FRA_PROTOCOL`); none of
/// iproute2's `rt_protos` has it. Whatever bears it, in our table or at our priorities, is ours to change and remove;
/// nothing else is.
pub const ROUTE_PROTOCOL: u8 = 151;

/// Metric of routes through the tunnel.
pub(crate) const TUNNEL_METRIC: u32 = 100;
/// Metric of the refusal that stays when the device of a tunnel route goes away.
pub(crate) const FALLBACK_METRIC: u32 = 4_278_198_272;

/// What happens to packets for a peer when its tunnel device is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WithoutDevice {
    /// They are refused (ICMP unreachable), so nothing leaves in clear text.
    #[default]
    Refuse,
    /// They go where they went before the tunnel was there, in clear text.
    Pass,
}

/// How routing is set up on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Number of the routing table that is ours.
    pub table: u32,
    /// Number of another one, with addresses of nodes, which only the node's own processes ask.
    pub node_table: u32,
    /// First of the ten rule priorities that are ours.
    pub priority: u32,
    /// First of the four UDP ports that tunnels of this cluster use, ours and those of peers.
    pub port: u16,
    /// Send the mesh's mutual TLS through the tunnel too.
    pub include_mesh: bool,
    /// TCP port of the mesh's mutual TLS.
    pub mesh_port: u16,
    /// What the names of the tunnel's devices begin with: addresses of such devices are ours.
    pub device_prefix: String,
    /// What happens while a device is missing.
    pub without_device: WithoutDevice,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            table: 15_871,
            node_table: 15_872,
            priority: 15_870,
            port: 51_871,
            include_mesh: false,
            mesh_port: 15_008,
            device_prefix: "sockmesh_wg".to_owned(),
            without_device: WithoutDevice::default(),
        }
    }
}

impl Settings {
    /// Tables 253 to 255 and 0 are the kernel's own; priorities from 32766 on come after the table that everybody uses.
    pub(crate) fn check(&self) -> Result<(), String> {
        for table in [self.table, self.node_table] {
            if table == 0 || (253..=255).contains(&table) {
                return Err(format!(
                    "routing table {table} belongs to the system; choose another number, such as 15871"
                ));
            }
        }
        if self.table == self.node_table {
            return Err(format!(
                "pods and processes of the node cannot have one routing table, {}, in common; choose another number for one \
                 of them, such as 15872",
                self.table
            ));
        }
        if self.priority == 0 || self.priority > 32_756 {
            return Err(format!(
                "rules at priority {} would not be asked before the main table (32766) and after the local one (0); \
                 choose a number from 1 to 32756, such as 15870",
                self.priority
            ));
        }
        if self.device_prefix.is_empty() {
            return Err("without a prefix every device would be the tunnel's; give one, such as sockmesh_wg"
                .to_owned());
        }
        if self.port == 0 || self.port > u16::MAX - 3 {
            return Err(format!(
                "UDP port {} has no three ports after it; choose another, such as 51871",
                self.port
            ));
        }
        Ok(())
    }
}
