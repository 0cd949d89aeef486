//! Real programs as applications in pods, each configured to start fast and keep its files in the pod's directory.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::User;

use crate::launch::Process;
use crate::mesh::{Pod, need};

/// How long a program may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(60);

/// nginx on `port`, both address families. It answers
/// * `/` with its pod's name and the request's `x-canary` header,
/// * `/status/<code>` with that status,
/// * files of the pod's directory `www` under `/files/`,
///
/// and names its pod in `x-served-by`.
///
/// # Errors
/// When nginx is missing or does not start.
pub fn nginx(pod: &Pod, port: u16) -> Result<Process> {
    nginx_with(pod, port, "", "")
}

/// The same, but it speaks only HTTP/2 with prior knowledge.
///
/// # Errors
/// When nginx is missing or does not start.
pub fn nginx_http2(pod: &Pod, port: u16) -> Result<Process> {
    nginx_with(pod, port, "http2", "")
}

/// The same over TLS, HTTP/1 and HTTP/2. Returns the file with the self-signed certificate, which is for `<pod>.test`, too.
///
/// # Errors
/// When nginx or openssl is missing or does not start.
pub fn nginx_tls(pod: &Pod, port: u16) -> Result<(Process, PathBuf)> {
    need(&[("openssl", "openssl")])?;
    let (key, certificate) = (pod.dir().join("tls.key"), pod.dir().join("tls.crt"));
    let name = format!("{}.test", pod.name());
    pod.launch("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", &format!("/CN={name}"), "-addext", &format!("subjectAltName=DNS:{name}"), "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()?
        .ok()?;
    let lines = format!("ssl_certificate {}; ssl_certificate_key {};", certificate.display(), key.display());
    Ok((nginx_with(pod, port, "ssl http2", &lines)?, certificate))
}

/// nginx on `port` that answers everything with this status.
///
/// # Errors
/// When nginx is missing or does not start.
pub fn nginx_that_answers(pod: &Pod, port: u16, status: u16) -> Result<Process> {
    nginx_with(pod, port, "", &format!("return {status};"))
}

/// nginx with these words after each `listen`, and these lines in its server.
fn nginx_with(pod: &Pod, port: u16, listen: &str, lines: &str) -> Result<Process> {
    need(&[("nginx", "nginx-light")])?;
    let dir = pod.dir();
    let www = dir.join("www");
    fs::create_dir_all(&www).with_context(|| format!("cannot make {}", www.display()))?;
    let statuses: String = [204, 400, 404, 429, 500, 502, 503, 504]
        .iter()
        .map(|s| format!("        location = /status/{s} {{ return {s}; }}\n"))
        .collect();
    let text = format!(
        "daemon off; master_process off; pid {dir}/nginx-{port}.pid; error_log stderr warn;
events {{ worker_connections 16384; }}
http {{
    access_log off; default_type text/plain; keepalive_requests 1000000; large_client_header_buffers 4 64k;
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi; client_max_body_size 0;
    server {{
        listen 0.0.0.0:{port} backlog=4096 {listen}; listen [::]:{port} backlog=4096 {listen};
        {lines}
        add_header x-served-by {name} always;
        location = / {{ return 200 \"{name} $http_x_canary\\n\"; }}
        location = /peer {{ return 200 \"$remote_addr\\n\"; }}
{statuses}        location /files/ {{ alias {www}/; }}
    }}
}}
",
        dir = dir.display(),
        www = www.display(),
        name = pod.name(),
    );
    let config = dir.join(format!("nginx-{port}.conf"));
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut process = pod.launch("nginx").arg("-c").arg(&config).arg("-e").arg("stderr").spawn()?;
    process.wait_for_port(port, START_LIMIT)?;
    Ok(process)
}

/// MariaDB on `port`, with a root account that needs no password. Its protocol has the server speak first.
///
/// # Errors
/// When it is missing or does not start.
pub fn mariadb(pod: &Pod, port: u16) -> Result<Process> {
    need(&[("mariadbd", "mariadb-server"), ("mariadb", "mariadb-client")])?;
    let data = owned_dir(pod, "mariadb", "mysql")?;
    let socket = pod.dir().join("mariadb").join("sock");
    // No system tables at all: mariadb-install-db takes seconds, and without grant tables none is needed.
    let mut process = pod
        .launch("mariadbd")
        .user("mysql")
        .args([
            "--no-defaults",
            "--skip-grant-tables",
            "--skip-networking=0",
            "--skip-log-bin",
            "--bind-address=*",
        ])
        .args(["--innodb-buffer-pool-size=8M", "--innodb-log-file-size=4M", "--innodb-flush-method=nosync"])
        .args(["--performance-schema=OFF", "--skip-name-resolve", "--max-connections=500", "--back-log=512"])
        .arg(format!("--datadir={}", data.display()))
        .arg(format!("--socket={}", socket.display()))
        .arg(format!("--pid-file={}", data.join("pid").display()))
        .arg(format!("--port={port}"))
        .spawn()?;
    process.wait_for_log("ready for connections", START_LIMIT)?;
    Ok(process)
}

/// Redis on `port`, both address families, nothing saved.
///
/// # Errors
/// When it is missing or does not start.
pub fn redis(pod: &Pod, port: u16) -> Result<Process> {
    need(&[("redis-server", "redis-server")])?;
    let mut process = pod
        .launch("redis-server")
        .args(["--port", &port.to_string(), "--bind", "0.0.0.0", "::", "--protected-mode", "no"])
        .args(["--save", "", "--appendonly", "no", "--dir"])
        .arg(pod.dir())
        .spawn()?;
    process.wait_for_port(port, START_LIMIT)?;
    Ok(process)
}

/// PostgreSQL on `port`, both address families, user `postgres` without a password.
///
/// # Errors
/// When it is missing or does not start.
pub fn postgres(pod: &Pod, port: u16) -> Result<Process> {
    need(&[("psql", "postgresql-client"), ("pg_lsclusters", "postgresql")])?;
    let bin = newest_postgres()?;
    let data = owned_dir(pod, "postgres", "postgres")?;
    pod.launch(bin.join("initdb"))
        .user("postgres")
        .env("LC_ALL", "C.UTF-8")
        .args(["--no-sync", "--auth=trust", "--username=postgres", "-D"])
        .arg(&data)
        .output()?
        .ok()?;
    let hba = data.join("pg_hba.conf");
    fs::write(&hba, "host all all all trust\nlocal all all trust\n")
        .with_context(|| format!("cannot write {}", hba.display()))?;
    let mut process = pod
        .launch(bin.join("postgres"))
        .user("postgres")
        .arg("-D")
        .arg(&data)
        .args(["-p", &port.to_string(), "-h", "*", "-F", "-k"])
        .arg(pod.dir().join("postgres"))
        .spawn()?;
    process.wait_for_log("database system is ready to accept connections", START_LIMIT)?;
    Ok(process)
}

/// Debian keeps the server's programs below a directory per major version.
fn newest_postgres() -> Result<PathBuf> {
    let base = Path::new("/usr/lib/postgresql");
    let entries = fs::read_dir(base).with_context(|| format!("cannot read {}", base.display()))?;
    let mut versions: Vec<u32> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    versions.sort_unstable();
    let newest = versions
        .last()
        .context("no version of PostgreSQL is installed (Debian: apt-get install postgresql)")?;
    Ok(base.join(newest.to_string()).join("bin"))
}

/// A directory of the pod that belongs to a user of the system.
fn owned_dir(pod: &Pod, name: &str, user: &str) -> Result<PathBuf> {
    let account = User::from_name(user)
        .with_context(|| format!("cannot look up the user {user}"))?
        .with_context(|| format!("there is no user {user}"))?;
    let outer = pod.dir().join(name);
    let inner = outer.join("data");
    fs::create_dir_all(&inner).with_context(|| format!("cannot make {}", inner.display()))?;
    for dir in [&outer, &inner] {
        chown(dir, Some(account.uid.as_raw()), Some(account.gid.as_raw()))
            .with_context(|| format!("cannot give {} to {user}", dir.display()))?;
    }
    Ok(inner)
}
