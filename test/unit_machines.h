static void test_resolver(void) { row("todo", true, "x"); }
static void test_upstream(void) { row("todo", true, "x"); }
static void test_discovery(void) { row("todo", true, "x"); }
static void test_server(void) { row("todo", true, "x"); }
static void test_exchange(void) { row("todo", true, "x"); }
static void test_loop(void) { row("todo", true, "x"); }
static void test_faults(void) { row("todo", true, "x"); }
