//! All scenarios; each module is a topic, each function a story whose name says what holds.

mod exceptions;
mod http;
mod operators;
mod peers;
mod policy;
mod protocols;
mod restarts;
mod retries;
mod services;
mod takeover;
mod tcp;
mod tunnel;
mod tunnel_changes;
mod tunnel_failures;
mod tunnel_kernel;
mod tunnel_nodes;
mod volume;

use std::process::ExitCode;

fn main() -> ExitCode {
    e2e::runner::main(e2e::scenarios![
        http::http1_works_across_nodes_and_on_one_node_and_is_never_plain_on_the_wire,
        http::services_are_reached_by_their_addresses_and_requests_bear_identities,
        http::a_replica_that_is_killed_under_load_fails_no_idempotent_request,
        http::a_post_that_reached_no_application_is_served_by_another_replica,
        http::a_service_that_cannot_be_reached_answers_503_with_its_reason,
        peers::client_and_server_see_each_others_true_addresses,
        peers::every_kind_of_tcp_socket_is_captured,
        peers::an_mptcp_socket_is_captured,
        peers::a_connect_through_io_uring_is_captured,
        peers::a_pod_reaches_itself_as_without_a_mesh,
        protocols::http2_with_prior_knowledge_is_balanced_by_request,
        protocols::grpc_of_all_four_kinds_works_with_its_trailers,
        protocols::websockets_pass_in_both_directions,
        protocols::tls_of_the_application_passes_untouched,
        protocols::hbone_and_the_native_tunnel_carry_http_and_tcp_as_the_peers_entry_says,
        tcp::without_a_mesh_the_same_things_hold,
        tcp::a_server_that_speaks_first_is_heard_at_once,
        tcp::databases_work_through_the_mesh,
        tcp::ncat_talks_to_ncat_through_the_mesh,
        tcp::a_refused_connection_is_refused_or_reset_and_never_a_clean_end,
        tcp::an_application_that_refuses_on_another_node_is_replaced_by_one_that_does_not,
        tcp::a_reset_arrives_as_a_reset_in_both_directions,
        tcp::half_closed_connections_go_on_in_the_other_direction,
        tcp::two_gibibytes_arrive_unchanged_both_ways,
        policy::a_strict_pod_refuses_a_stranger_and_a_permissive_one_serves_it,
        policy::a_pod_that_left_the_mesh_is_a_stranger_to_those_who_are_in_it,
        policy::a_pod_that_its_node_has_not_heard_of_gets_no_plain_connection,
        policy::two_pods_of_one_node_shake_hands_where_that_is_asked_for,
        policy::a_stricter_policy_ends_the_plain_connections_that_it_forbids,
        policy::peers_that_the_mesh_did_not_certify_are_refused_by_name,
        exceptions::excluded_destinations_are_reached_without_the_mesh_and_no_others,
        exceptions::an_excluded_port_of_a_strict_pod_is_open_to_everybody_and_no_other_one,
        exceptions::a_port_without_mtls_is_open_to_everybody_and_no_other_one,
        exceptions::an_excluded_source_reaches_a_strict_pod_and_no_other_one_does,
        exceptions::probes_of_the_node_itself_reach_a_strict_pod_and_those_who_pretend_do_not,
        services::several_ports_of_a_service_lead_where_each_pod_names_them,
        services::pods_of_a_headless_service_are_reached_by_their_own_addresses_under_its_name,
        services::an_endpoint_that_is_terminating_is_drained_without_losing_a_request,
        services::an_endpoint_that_is_terminating_still_answers_those_who_ask_for_it,
        operators::a_bad_manifest_is_named_and_leaves_the_last_good_state_in_force,
        operators::the_access_log_tells_who_talked_to_whom_and_how_it_ended,
        operators::wrong_inputs_of_the_nodes_commands_end_with_what_to_do,
        operators::wrong_inputs_of_the_controller_end_with_what_to_do,
        retries::an_answer_of_503_is_replaced_by_another_replicas_for_a_get_and_not_for_a_post,
        retries::a_request_that_is_not_answered_in_time_gets_504_with_its_reason,
        retries::retries_end_with_their_budget_and_the_answer_says_so,
        restarts::a_worker_that_is_killed_under_load_refuses_no_connection_and_sends_nothing_plain,
        restarts::an_agent_that_is_killed_and_comes_back_costs_no_request,
        restarts::a_pod_whose_node_proxy_is_gone_is_refused_and_never_sent_out_plain,
        restarts::a_pod_that_fails_open_goes_on_without_its_node_proxy_and_one_beside_it_does_not,
        restarts::a_root_that_is_replaced_under_load_costs_no_request,
        restarts::certificates_that_are_renewed_all_the_time_cost_no_request,
        restarts::a_pod_that_joins_and_leaves_all_the_time_costs_no_request,
        restarts::uninstalling_leaves_nothing_and_gives_the_network_back,
        restarts::processes_have_the_rights_that_they_need_and_no_more,
        takeover::an_agent_takes_a_node_over_from_another_under_load_and_no_request_fails,
        takeover::an_agent_that_cannot_get_ready_leaves_the_node_to_the_other_one,
        takeover::an_agent_that_dies_after_it_took_the_node_is_replaced_and_nothing_is_sent_plain,
        takeover::pods_join_and_leave_while_the_node_changes_hands,
        takeover::uninstalling_in_the_middle_of_a_take_over_leaves_nothing,
        takeover::an_agent_that_handed_the_node_over_and_is_started_again_waits_to_be_ended,
        takeover::an_enrolment_that_takes_long_does_not_keep_the_node_from_changing_hands,
        takeover::an_agent_that_handed_the_node_over_lets_go_of_pods_that_are_gone,
        takeover::an_agent_whose_cni_plugin_would_be_in_no_chain_does_not_take_the_node,
        takeover::an_agent_without_a_worker_hands_its_pods_over,
        takeover::a_successor_with_other_maps_serves_the_pods_and_the_old_worker_goes_on,
        tunnel::datagrams_echoes_and_strangers_streams_cross_between_nodes_inside_the_tunnel,
        tunnel::keys_change_under_load_and_no_datagram_is_lost,
        tunnel::a_tunnel_that_dies_refuses_until_the_next_one_is_known_and_sends_nothing_plain,
        tunnel::an_agent_takes_the_tunnel_over_from_another_and_hardly_a_datagram_is_lost,
        tunnel::what_a_route_leads_past_the_tunnel_is_dropped_by_name_for_pods_that_ask_for_it,
        tunnel::a_path_that_is_narrow_and_says_so_is_named_and_is_no_failure,
        tunnel::a_path_that_swallows_large_packets_is_named_and_what_crosses_is_made_to_fit,
        tunnel::a_node_that_is_to_have_no_tunnel_any_more_and_one_that_is_uninstalled_keep_no_trace_of_it,
        tunnel_kernel::the_kernels_wireguard_keeps_keys_and_sessions_whatever_becomes_of_agents,
        tunnel_kernel::a_tunnel_moves_into_the_kernel_and_back_while_agents_change_and_sends_nothing_plain,
        tunnel_kernel::an_agent_that_is_started_anew_goes_on_in_the_kernel_until_its_process_can_take_over,
        tunnel_kernel::auto_takes_the_kernels_wireguard_where_there_is_one_else_a_process_and_says_why,
        tunnel_failures::after_the_start_of_a_computer_nothing_goes_out_in_plain_while_the_tunnel_cannot_begin,
        tunnel_failures::a_process_that_hangs_or_refuses_everything_is_replaced,
        tunnel_failures::what_an_agent_cannot_find_out_is_told_and_the_tunnel_goes_on,
        tunnel_failures::agents_that_follow_each_other_at_once_have_a_tunnel_each,
        tunnel_changes::rotations_of_both_nodes_under_streams_and_datagrams_break_no_stream,
        tunnel_changes::the_nodes_that_stay_send_nothing_into_the_tunnel_of_one_that_is_uninstalled,
        tunnel_changes::what_somebody_takes_from_the_tunnel_comes_back_and_meanwhile_nothing_goes_in_plain,
        tunnel_changes::without_the_controller_an_agent_finds_its_tunnel_again_and_sends_nothing_plain,
        tunnel_changes::an_agent_takes_the_tunnel_over_only_when_other_nodes_can_hear_of_its_key,
        tunnel_nodes::what_nodes_say_to_each_other_goes_inside_where_that_is_wanted_and_leaves_no_trace_where_it_is_not,
        tunnel_nodes::what_nodes_say_to_each_other_never_depends_on_the_tunnel_and_api_servers_are_left_out,
        volume::five_thousand_http_connections_at_the_same_time_are_served,
        volume::five_thousand_tcp_connections_at_the_same_time_are_each_their_own,
        volume::a_pod_takes_no_more_connections_than_it_may_from_either_node,
        volume::iperf3_moves_its_streams_in_every_direction,
        volume::readers_that_do_not_read_cost_little_memory,
        volume::http_clients_that_stop_reading_cost_little_memory,
    ])
}
