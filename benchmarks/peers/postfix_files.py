"""What Postfix and OpenDKIM are configured with, as texts: pure, so that a test reads them and the results hold them.

Each line that is not Postfix's default is there to make it faster or to keep it to itself; the groups say why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.peers.peer import Setting
from benchmarks.peers.signing import SELECTOR
from engine.rehearsal.setting import DOMAIN

QUEUES: Final = (
    "active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved", "trace",
    "public", "maildrop",
)  # fmt: skip


def main_cf(folder: Path, port: int, setting: Setting, *, log: bool = False) -> str:
    """Postfix's configuration. port: the sink's; log: into folder/data/log instead of syslog."""
    hop = f"[127.0.0.1]:{port}"
    return f"""# Written by benchmarks.peers: one relay, one destination, as fast as Postfix goes.
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
mail_owner = postfix
setgid_group = postdrop
myhostname = postfix.peer.test
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
# everything goes to the sink; nothing is looked up
relayhost = {hop}
smtp_dns_support_level = disabled
smtp_host_lookup = native
smtpd_peername_lookup = no
# intake: no checks but "from this host"
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_recipient_restrictions = permit_mynetworks, reject
smtpd_client_restrictions =
smtpd_data_restrictions =
receive_override_options = no_address_mappings, no_header_body_checks
local_header_rewrite_clients =
smtpd_client_connection_count_limit = 0
smtpd_client_event_limit_exceptions = static:all
smtpd_timeout = 300s
smtputf8_enable = no
strict_rfc821_envelopes = no
message_size_limit = 0
queue_minfree = 0
# no brake between intake and delivery
in_flow_delay = 0
default_process_limit = 200
qmgr_message_active_limit = 50000
qmgr_message_recipient_limit = 50000
max_use = 100000
max_idle = 300s
# delivery: as many connections as probed, from the first message on, each kept and used again without a limit
default_destination_concurrency_limit = {setting["concurrency"]}
initial_destination_concurrency = {setting["concurrency"]}
smtp_destination_concurrency_failed_cohort_limit = 0
smtp_connection_cache_on_demand = yes
smtp_connection_cache_destinations = {hop}
smtp_connection_cache_time_limit = 10s
smtp_connection_reuse_count_limit = 0
smtp_connection_reuse_time_limit = 3600s
smtp_tls_security_level = none
smtpd_tls_security_level = none
delay_logging_resolution_limit = 2
# OpenDKIM signs; a message it cannot sign is refused, so that nothing unsigned is timed
smtpd_milters = unix:{folder}/milter
milter_default_action = tempfail
milter_protocol = 6
{f"maillog_file = {folder}/data/log" if log else "# log: syslog, as always"}
{f"maillog_file_prefixes = {folder}" if log else ""}
"""


def master_cf(port: int, setting: Setting, *, delivering: bool = True) -> str:
    """Postfix's services. port: the intake's; delivering: with a queue manager."""
    manager = "qmgr       unix  n  -  n  300  1  qmgr" if delivering else "# no queue manager: nothing is delivered"
    return f"""# service  type  private unpriv chroot wakeup maxproc command
127.0.0.1:{port} inet n - n - {setting["connections"] + 5} smtpd
cleanup    unix  n  -  n  -  0  cleanup
{manager}
rewrite    unix  -  -  n  -  -  trivial-rewrite
bounce     unix  -  -  n  -  0  bounce
defer      unix  -  -  n  -  0  bounce
trace      unix  -  -  n  -  0  bounce
verify     unix  -  -  n  -  1  verify
flush      unix  n  -  n  -  0  flush
proxymap   unix  -  -  n  -  -  proxymap
smtp       unix  -  -  n  -  {setting["concurrency"]}  smtp
error      unix  -  -  n  -  -  error
retry      unix  -  -  n  -  -  error
discard    unix  -  -  n  -  -  discard
anvil      unix  -  -  n  -  1  anvil
scache     unix  -  -  n  -  1  scache
postlog    unix-dgram n - n - 1 postlogd
"""


def opendkim_conf(folder: Path) -> str:
    """OpenDKIM's configuration: sign everything that comes, the cheapest canonicalization of the body."""
    return f"""# Written by benchmarks.peers
Mode                s
Domain              {DOMAIN}
Selector            {SELECTOR}
KeyFile             {folder}/dkim.pem
Socket              local:{folder}/milter
Canonicalization    relaxed/simple
SignatureAlgorithm  rsa-sha256
InternalHosts       0.0.0.0/0
OversignHeaders     From
RequireSafeKeys     no
AllowSHA1Only       no
Background          no
AutoRestart         no
Syslog              no
LogWhy              no
UMask               007
"""
