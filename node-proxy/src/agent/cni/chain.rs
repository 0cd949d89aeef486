//! The text of a network configuration, with and without the mesh's plugin in it. Pure.

use std::path::Path;

use serde_json::{Value, json};

/// The plugin's name: its file in the directory of plugins, and its `type`.
pub(super) const PLUGIN: &str = "sockmesh-cni";

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

/// The configuration with `plugin` last in its chain; a single plugin becomes a chain. `None` when it is so already.
///
/// # Errors
/// When the text is no network configuration.
pub(super) fn with(text: &[u8], plugin: &Value) -> Result<Option<Value>, String> {
    let mut found: Value = serde_json::from_slice(text).map_err(|e| format!("is not JSON: {e}"))?;
    if let Some(plugins) = found.get_mut("plugins") {
        let plugins = plugins.as_array_mut().ok_or("has plugins that are no list")?;
        if plugins.iter().filter(|p| is_ours(p)).count() == 1 && plugins.last() == Some(plugin) {
            return Ok(None);
        }
        plugins.retain(|p| !is_ours(p));
        if plugins.is_empty() {
            return Err("has no plugin that makes a network".to_owned());
        }
        plugins.push(plugin.clone());
        return Ok(Some(found));
    }
    if !found["type"].is_string() {
        return Err("is neither a plugin nor a list of plugins".to_owned());
    }
    let mut list = json!({ "name": found["name"], "plugins": [found, plugin] });
    if let Some(version) = found.get("cniVersion") {
        list["cniVersion"] = version.clone();
    }
    Ok(Some(list))
}

/// The chain without the mesh's plugin; `None` when it is not in there. With `socket` only the entry of the agent that
/// listens there counts: a mesh beside this one keeps its own.
pub(super) fn without(text: &[u8], socket: Option<&Path>) -> Option<Value> {
    let mut found: Value = serde_json::from_slice(text).ok()?;
    let plugins = found.get_mut("plugins")?.as_array_mut()?;
    let before = plugins.len();
    let meant =
        |p: &Value| is_ours(p) && socket.is_none_or(|s| p["socket"].as_str().map(Path::new) == Some(s));
    plugins.retain(|p| !meant(p));
    (plugins.len() != before).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Value {
        json!({ "type": PLUGIN, "socket": "/run/sockmesh/agent.sock" })
    }

    fn put(configuration: &Value) -> Result<Option<Value>, String> {
        with(configuration.to_string().as_bytes(), &ours())
    }

    #[test]
    fn the_plugin_is_put_last_once_and_taken_out_again() {
        let before = json!({
            "cniVersion": "1.0.0", "name": "net", "disableCheck": true,
            "plugins": [{ "type": "ptp", "ipam": { "type": "host-local" } }, { "type": "portmap" }],
        });
        let after = put(&before).unwrap().unwrap();
        assert_eq!(after["plugins"].as_array().unwrap().len(), 3);
        assert_eq!(after["plugins"][2], ours());
        assert_eq!(put(&after).unwrap(), None, "it is there already");
        assert_eq!(without(after.to_string().as_bytes(), None), Some(before.clone()));
        assert_eq!(without(before.to_string().as_bytes(), None), None);
    }

    #[test]
    fn an_old_entry_of_ours_or_one_in_the_middle_is_replaced() {
        let old = json!({ "type": PLUGIN, "socket": "/elsewhere" });
        for plugins in
            [json!([{ "type": "ptp" }, old]), json!([{ "type": "ptp" }, ours(), { "type": "late" }])]
        {
            let after = put(&json!({ "name": "net", "plugins": plugins })).unwrap().unwrap();
            let plugins = after["plugins"].as_array().unwrap();
            assert_eq!(plugins.last(), Some(&ours()));
            assert_eq!(plugins.iter().filter(|p| is_ours(p)).count(), 1);
        }
    }

    #[test]
    fn the_entry_of_another_agent_is_left_alone() {
        let text = json!({ "name": "net", "plugins": [{ "type": "ptp" }, ours()] }).to_string();
        assert_eq!(without(text.as_bytes(), Some(Path::new("/run/other/agent.sock"))), None);
        assert!(without(text.as_bytes(), Some(Path::new("/run/sockmesh/agent.sock"))).is_some());
    }

    #[test]
    fn a_single_plugin_becomes_a_chain() {
        let single = json!({ "cniVersion": "0.4.0", "name": "net", "type": "bridge" });
        let after = put(&single).unwrap().unwrap();
        assert_eq!(after, json!({ "cniVersion": "0.4.0", "name": "net", "plugins": [single, ours()] }));
    }

    #[test]
    fn what_is_no_configuration_is_left_alone() {
        for bad in ["", "[]", "{}", r#"{"plugins": 1}"#, r#"{"plugins": []}"#] {
            with(bad.as_bytes(), &ours()).expect_err(bad);
            assert_eq!(without(bad.as_bytes(), None), None, "{bad}");
        }
    }
}
