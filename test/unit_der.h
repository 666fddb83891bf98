static void test_der(void) { row("todo", true, "x"); }
static void test_certificates(void) { row("todo", true, "x"); }
static void test_pem(void) { row("todo", true, "x"); }
static void test_anchors(void) { row("todo", true, "x"); }
